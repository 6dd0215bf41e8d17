"""Blocks of recipes: models, optimizers and the fields of all recipes, each a plain dict.

`ctssl_jax.training.fields.FIELDS` has the meaning and the allowed values of each field.
"""

from typing import Any

from data_prep.system.errors import InputError

# An output pixel sees the masked square and its surroundings.
_SMALL_ENCODER = {"hidden": (24, 48), "depth": 6}


def is_small(size: str) -> bool:
    """Whether a recipe gets 64 x 64 pixels and a model for two CPU cores, not the reference size.

    Raises:
      InputError: another word than `reference` or `small`.
    """
    if size not in ("reference", "small"):
        raise InputError(f"size {size!r} is not known; choose reference or small")
    return size == "small"


def dataset(
    *, image_size: int, windows: tuple = ((50, 350),), normalize: str = "window"
) -> dict[str, Any]:
    """Data that are read, and how grey values become inputs."""
    read = {"dataset": "", "windows": windows, "image_size": image_size, "normalize": normalize}
    windowed = {"shuffle_window": 16_384, "shuffle_streams": 0, "shards_gb": 32.0}
    order = {"train_fraction": 1.0, "seed": 0, "reading_threads": 4, "shuffle": "global"}
    return read | order | windowed


def initial_weights(*, init_scope: str) -> dict[str, Any]:
    """Weights that come from another run, if `init_from` names one."""
    return {
        "init_from": "",
        "init_scope": init_scope,
        "init_checkpoint": "best",
        "leakage": "refuse",
    }


def _encoder(small: bool) -> dict[str, Any]:
    size = _SMALL_ENCODER if small else {"hidden": (256, 512), "depth": 18}
    return {"in_channels": 1, **size, "embedding_dim": 64, "drop_rate": 0.0}


def vqvae(small: bool) -> dict[str, Any]:
    """The autoencoder.

    The codebook of the small model follows the latents by moving averages, starts from data and
    revives unused codes: gradient updates let it collapse to a few codes within hundreds of steps.
    """
    codebook = {"num_codes": 512, "vq_ema_decay": 0.99, "vq_revive_below": 0.05}
    if small:
        updates = {"vq_update": "ema", "vq_init": "data", "vq_revive_every": 50}
    else:  # the paper's updates, the release's start
        updates = {"vq_update": "gradient", "vq_init": "uniform", "vq_revive_every": 0}
    return _encoder(small) | {"output_activation": "unit_tanh"} | codebook | updates


def classifier(small: bool) -> dict[str, Any]:
    """The autoencoder's encoder with compression and classification layers."""
    return _encoder(small) | {"compression": (128, 256)}


def unet(small: bool) -> dict[str, Any]:
    """The autoencoder's encoder as the down branch of a U-Net."""
    return _encoder(small) | {"residual_stack": False}


def joint_embedding(
    small: bool, *, projector: tuple[int, ...], num_prototypes: int = 0
) -> dict[str, Any]:
    """The autoencoder's encoder with a projector; with prototypes also a teacher."""
    head = {"projector": projector, "num_prototypes": num_prototypes}
    return _encoder(small) | {"pooled": "latents", "neck": "none"} | head


def spark(small: bool) -> dict[str, Any]:
    """The autoencoder's encoder with the light decoder of sparse masked modelling, which reaches
    over a block of 8 (small: 2) positions."""
    return _encoder(small) | {"pooled": "latents", "decoder_depth": 2 if small else 4}


def views(small: bool, *, num_local: int) -> dict[str, Any]:
    """Two large views of an item, and small ones, from three slices within 12 mm."""
    large, little = (64, 32) if small else (256, 144)
    slab = {"slices": 3, "slab_mm": 12.0}
    global_ = {"num_global": 2, "global_size": large, "global_area": (0.3, 1.0)}
    local = {"num_local": num_local, "local_size": little, "local_area": (0.05, 0.3)}
    grey = {"window_shift": 0.1, "window_width": 0.1, "gamma": 0.1, "noise": 0.02, "blur": 0.5}
    return {**slab, **global_, **local, "flip": False, **grey}


def augmentation(**strengths: Any) -> dict[str, Any]:
    """Strengths of the augmentations of training slices; all that are not named are off."""
    geometry = {"shift": 0.0, "scale": 0.0, "rotation_degrees": 0.0, "flip": False}
    return geometry | {"contrast": 0.0, "cutout_holes": 0, "cutout_side": 0.0} | strengths


def joint_optimizer(small: bool) -> dict[str, Any]:
    """AdamW as LeJEPA uses it with convolutions: warm-up, cosine to a thousandth, clipped
    gradients."""
    rate, warmup_steps = (2e-3, 50) if small else (5e-4, 2_000)
    return optimizer("adamw", rate, schedule="cosine", warmup_steps=warmup_steps) | {
        "learning_rate_floor": 1e-3,
        "weight_decay": 5e-4,
        "gradient_clip": 3.0,
    }


def optimizer(
    name: str, learning_rate: float, *, schedule: str = "constant", warmup_steps: int = 0
) -> dict[str, Any]:
    """RAdam or AdamW without weight decay and clipping, with one learning rate for all layers."""
    rate = {"learning_rate": learning_rate, "schedule": schedule, "warmup_steps": warmup_steps}
    return {
        "optimizer": name,
        **rate,
        "learning_rate_floor": 0.0,
        "prolonged": (),
        "encoder_learning_rate_factor": 1.0,
        "weight_decay": 0.0,
        "gradient_clip": 0.0,
    }


def execution(*, batch_size: int = 16) -> dict[str, Any]:
    """How a step is spread over devices and memory; float32 without recomputation."""
    memory = {
        "microbatches": 1,
        "dtype": "float32",
        "remat": False,
        "scan": False,
        "fsdp_devices": 1,
        "batch_norm_group": 0,
    }
    return {"batch_size": batch_size, **memory}


def reporting(*, best_by: str, eval_every: int = 2_000) -> dict[str, Any]:
    """How often a run reports, saves and validates, and what its best checkpoint is.

    A validation scores seven slices for every ten steps before it. At 16 slices a step, each of
    which costs about three forward passes, that is 1.5 % of the time, and below 5 % where a frozen
    encoder makes a step as cheap as one.
    """
    every = {"log_every": 50, "eval_every": eval_every}
    scored = {"validation_slices": 7 * eval_every // 10, "best_by": best_by}
    return {**every, **scored, "num_pictures": 4}
