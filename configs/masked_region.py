"""Masked region prediction with the paper's model (section II): 101 million parameters, slices of 512 x 512.

    python -m ctssl_jax.train --config=configs/masked_region.py \
        --config.dataset=DATASET --workdir=RUN --config.dtype=bfloat16

needs an accelerator (a step is about 10 TFLOP a slice). The same code at a size that a laptop trains in minutes, on a
dataset prepared with `--image_size=64` (every recipe has it, `configs/rotation.py:small` and so on):

    python -m ctssl_jax.train --config=configs/masked_region.py:small --config.dataset=DATASET --workdir=RUN

On the synthetic archive of `python -m experiments.quickstart` (34 patients for training, 7 for the test) that took
777 s on two busy CPU cores and reached masked MSE 0.0223, MSE 0.0088 and SSIM 0.844 on the test patients; the mean
training slice has a masked MSE of 0.0574. Every field can be overridden on the command line as `--config.FIELD=VALUE`.
"""

import ml_collections


def get_config(size: str = "reference") -> ml_collections.ConfigDict:
    """The default recipe: the paper's values or, where it is silent or contradicts itself, those of README's table.

    Args:
      size: `reference`, or `small` for a 64 x 64 model and a short schedule.
    """
    config = ml_collections.ConfigDict()
    config.recipe = "masked_region"  # name in results and tables
    config.task = "masked_region"
    config.dataset = ""  # dataset directory made by data_prep.prepare; required
    config.windows = ((50, 350),)  # (level, width) in HU of each channel that is read; () takes all the dataset has
    config.image_size = 512  # must be the dataset's
    config.seed = 0  # of weights, order of slices and masks

    config.init_from = ""  # run directory that the weights come from; "" starts from random ones
    config.init_scope = "model"  # all tensors, which must fit; encoder: its alone; compression: its first layers alone
    config.init_checkpoint = "best"  # best, last or a step
    config.leakage = "refuse"  # weights that learned from this dataset's validation or test patients: refuse; or
    # allow_unchecked: let pass what cannot be compared (other pseudonym key); allow: let pass all. Results say it.
    config.train_fraction = 1.0  # share of the training split, by whole studies drawn by the seed

    config.mask = ml_collections.ConfigDict()
    config.mask.fraction = 0.2  # 0.05, 0.10, 0.20, 0.33 in the paper
    config.mask.unit = "area"  # area: share of the image area (the paper's text); side: share of its side (the release)
    config.mask.margin = 0  # rows and columns at the bottom and right where no mask may lie; 100 in the release
    config.mask.fill = 0.0  # grey value of the masked region
    config.normalize = "window"  # window: same HU, same grey; slice_minmax: stretch every slice (the release)

    config.model = ml_collections.ConfigDict()
    config.model.in_channels = 1  # 3 for weights of the authors' shape
    config.model.hidden = (256, 512)
    config.model.depth = 18  # residual blocks in the encoder, and again in the decoder
    config.model.embedding_dim = 64
    config.model.num_codes = 512
    config.model.drop_rate = 0.0
    config.model.output_activation = "unit_tanh"  # (tanh + 1) / 2; tanh for weights of the authors' shape
    config.model.vq_update = "gradient"  # gradient (the paper) or ema
    config.model.vq_ema_decay = 0.99
    config.model.vq_init = "uniform"  # uniform (the release) or data: from the latents of the first batch
    config.model.vq_revive_every = 0  # steps (microbatches) between revivals of unused codes; 0 never
    config.model.vq_revive_below = 0.05  # see VQVAEConfig

    config.loss = ml_collections.ConfigDict()  # weights of the composite loss
    config.loss.mse = 0.2
    config.loss.masked_mse = 0.2
    config.loss.vq = 0.8
    config.loss.ssim = 0.1  # subtracted
    config.commitment = 0.25  # beta: share of the commitment loss in the VQ loss
    config.ssim_rescale = False  # True stretches each prediction to [0, 1] for the SSIM of the loss (the release)

    config.optimizer = "radam"  # radam or adamw
    config.learning_rate = 1e-3
    config.encoder_learning_rate_factor = 1.0  # of the encoder's steps; 0 freezes it, batch statistics included
    config.schedule = "constant"  # constant, cosine or linear (to zero at num_steps)
    config.warmup_steps = 0
    config.weight_decay = 0.0
    config.gradient_clip = 0.0  # global norm; 0 is off

    config.num_steps = 100_000
    config.batch_size = 16  # slices a step, over all devices
    config.microbatches = 1  # the batch is worked off in this many parts; BatchNorm and EMA codebook see each part
    config.dtype = "float32"  # bfloat16 on accelerators: convolutions only; weights, statistics and losses stay float32
    config.remat = False  # recompute residual blocks in the backward pass: less memory, more time
    config.scan = False  # residual blocks as one scan: smaller programs and memory on accelerators, slow on CPU
    config.fsdp_devices = 1  # devices that share one copy of parameters and optimizer state; 1: each has a whole one

    config.log_every = 50  # steps
    config.eval_every = 2_000  # steps: validation, pictures and a checkpoint
    config.num_pictures = 4  # validation slices in each picture
    config.reading_threads = 4

    if size == "small":
        shrink(config)
    elif size != "reference":
        raise ValueError(f"size {size!r} is not known; choose reference or small")
    return config


def shrink(config: ml_collections.ConfigDict) -> None:
    """Make a recipe small: minutes on two CPU cores, with a codebook that cannot collapse.

    The codebook follows the latents by moving averages, starts from data and revives unused codes: plain gradient
    updates let it collapse to a few codes within hundreds of steps.
    """
    config.recipe += "_small"
    config.image_size = 64
    config.model.hidden = (24, 48)
    config.model.depth = 6  # the masked square and its surroundings lie within what one output pixel sees
    config.model.vq_update = "ema"
    config.model.vq_init = "data"
    config.model.vq_revive_every = 50
    config.loss.masked_mse = 1.0
    config.learning_rate = 2e-2  # the output layer starts at mid-grey and has far to go to black
    config.schedule = "cosine"
    config.warmup_steps = 50
    config.num_steps = 1_500
    config.eval_every = 500
