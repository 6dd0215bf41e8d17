"""Several pretext objectives at once: one encoder, each objective with its own corruption and head
on the same slices, their losses added with the weights of `config.objectives`.

Each objective is the task of its name: it sees `config` as its own recipe would hold it, and
corrupts a slice as it does alone. All pass the encoder by themselves, so that a step costs what
their steps cost together, and the encoder's running statistics follow the inputs of all in turn.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from ctssl_jax.data.slices import Targets
from ctssl_jax.models.classifier import ClassifierConfig
from ctssl_jax.models.joint_embedding import JointEmbeddingConfig
from ctssl_jax.models.mixed import Mixed
from ctssl_jax.models.spark import SparkConfig
from ctssl_jax.models.vqvae import VQVAEConfig
from ctssl_jax.tasks import joint_embedding, reconstruction, sparse, transformation
from ctssl_jax.tasks.interface import Objective, StepOutput, Task, item_slices, model_config
from data_prep.system.errors import InputError


class _Part(NamedTuple):
    """A task that can be mixed, and the settings of its model."""

    task: Task
    settings: type[Any]


PARTS = {
    "masked_region": _Part(reconstruction.MASKED_REGION, VQVAEConfig),
    "next_slice": _Part(reconstruction.NEXT_SLICE, VQVAEConfig),
    "denoising": _Part(reconstruction.DENOISING, VQVAEConfig),
    "spark": _Part(sparse.SPARK, SparkConfig),
    "rotation": _Part(transformation.ROTATION, ClassifierConfig),
    "flip": _Part(transformation.FLIP, ClassifierConfig),
    "lejepa": _Part(joint_embedding.LEJEPA, JointEmbeddingConfig),
    "visreg": _Part(joint_embedding.VISREG, JointEmbeddingConfig),
    "vicreg": _Part(joint_embedding.VICREG, JointEmbeddingConfig),
    "simclr": _Part(joint_embedding.SIMCLR, JointEmbeddingConfig),
    "dino": _Part(joint_embedding.DINO, JointEmbeddingConfig),
}
_FIELDS = tuple(dict.fromkeys(field for part in PARTS.values() for field in part.task.fields))


def _own(name: str, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The configuration as a recipe of one objective alone holds it."""
    own = config.copy_and_resolve_references()
    part = PARTS[name]
    with own.unlocked():
        own.task = name
        for field in _FIELDS:
            if field not in part.task.fields:
                del own[field]
        for field in list(own.model):
            if field not in part.settings.__dataclass_fields__:
                del own.model[field]
        if "num_prototypes" in own.model and "teacher" not in part.task.fields:
            own.model.num_prototypes = 0
    return own


def _names(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    return tuple(name for name, _ in config.objectives)


def _offsets(config: ml_collections.ConfigDict) -> tuple[int, ...]:
    """The slices of all objectives together."""
    offsets = {
        offset for name in _names(config) for offset in PARTS[name].task.offsets(_own(name, config))
    }
    return tuple(sorted(offsets))


def _targets(config: ml_collections.ConfigDict) -> Targets:
    of_each = [PARTS[name].task.targets(_own(name, config)) for name in _names(config)]
    return Targets(
        step_mm=max(targets.step_mm for targets in of_each),
        patient=any(targets.patient for targets in of_each),
    )


def _settings(config: ml_collections.ConfigDict) -> JointEmbeddingConfig:
    return model_config(JointEmbeddingConfig, _own("dino", config))


def _build(config: ml_collections.ConfigDict, rngs: nnx.Rngs) -> Mixed:
    models = {
        name: PARTS[name].task.build(_own(name, config), rngs) for name in sorted(_names(config))
    }
    return Mixed(_settings(config), models)


def _apply_one(
    name: str,
    model: Mixed,
    batch: dict[str, jax.Array],
    keys: jax.Array,
    model_key: jax.Array | None,
    config: ml_collections.ConfigDict,
    *,
    train: bool,
) -> StepOutput:
    """The output of one objective, as `Task.apply` of its task."""
    task, own, offsets = PARTS[name].task, _own(name, config), _offsets(config)
    columns = [offsets.index(offset) for offset in task.offsets(own)]
    if model_key is not None:
        model_key = jax.random.fold_in(model_key, list(PARTS).index(name))
    seen = batch | {"images": jnp.stack([batch["images"][:, n] for n in columns], axis=1)}
    return task.apply(model.heads[name], seen, keys, model_key, own, train=train)


def _apply(
    model: Mixed,
    batch: dict[str, jax.Array],
    keys: jax.Array,
    model_key: jax.Array | None,
    config: ml_collections.ConfigDict,
    *,
    train: bool,
) -> StepOutput:
    """The objectives in turn. Scores are named `OBJECTIVE/score`, and `OBJECTIVE/loss` is without
    its weight; pictures are those of the first one and, in training, `OBJECTIVE: name` of others.

    Arguments as those of `Task.apply`. In evaluation the embedding is of whole, clean slices.
    """
    outputs = {
        name: _apply_one(name, model, batch, keys, model_key, config, train=train)
        for name in _names(config)
    }
    scores = {}
    for name, output in outputs.items():
        scores |= {f"{name}/loss": output.loss}
        scores |= {f"{name}/{score}": values for score, values in output.scores.items()}
    first, *others = outputs
    pictures = dict(outputs[first].pictures)
    for name in others if train else ():  # for `ctssl views`; XLA leaves them out of a step
        own = dict(outputs[name].pictures)
        if "target" not in own:  # views, whose input is the slice itself
            del own["input"]
        elif len(PARTS[name].task.offsets(_own(name, config))) == 1:  # the slice itself
            del own["target"]
        pictures |= {f"{name}: {title}": picture for title, picture in own.items()}
    embedding = outputs[first].embedding
    if not train:
        slices = item_slices(batch["images"], _offsets(config).index(0), config)
        embedding = model(slices, train=False).embedding
    counts = (output.code_counts for output in outputs.values())
    return StepOutput(
        loss=sum(weight * outputs[name].loss for name, weight in config.objectives),
        scores=scores,
        pictures=pictures,
        embedding=embedding,
        code_counts=next((values for values in counts if values is not None), None),
    )


def _after_step(model: Mixed, config: ml_collections.ConfigDict) -> None:
    for name in _names(config):
        if PARTS[name].task.after_step is not None:
            PARTS[name].task.after_step(model.heads[name], _own(name, config))


def _check(config: ml_collections.ConfigDict) -> None:
    pairs = config.objectives
    example = '--config.objectives=\'(("masked_region", 1.0), ("lejepa", 0.5))\''
    if not pairs or any(not isinstance(pair, tuple | list) or len(pair) != 2 for pair in pairs):
        raise InputError(f"config.objectives={pairs}: must hold (name, weight) pairs, {example}")
    for name, weight in pairs:
        if not isinstance(name, str) or name not in PARTS:
            raise InputError(
                f"config.objectives: {name!r} is not known; choose from {', '.join(PARTS)}"
                + (
                    "; SimMIM is masked_region with --config.mask.block and "
                    "--config.mask.fraction of the recipe simmim"
                    if str(name).lower() == "simmim"
                    else ""
                )
            )
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 < weight < float("inf"):
            raise InputError(
                f"config.objectives: the weight of {name} is {weight!r}; it must be a number above "
                "0; to leave an objective out, do not name it"
            )
    names = _names(config)
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"config.objectives names {name} {names.count(name)} times; give it once, with the "
                "sum of the weights"
            )
    if {"lejepa", "visreg"} <= set(names):
        raise InputError(
            "config.objectives: lejepa and visreg both read config.regulariser, whose weight is "
            "0.05 in one and 0.7 in the other; take one of them"
        )
    of_views = [name for name in names if "views" in PARTS[name].task.fields]
    if "next_slice" in names and of_views:
        raise InputError(
            f"config.objectives: next_slice needs slices by number, {of_views[0]} slices by "
            "distance (config.views.slab_mm), and an item holds one or the other; take one of them"
        )
    if config.model.neck != "none":
        raise InputError(
            f"config.model.neck={config.model.neck!r}: each head of a mix would have a neck of its "
            "own, and embeddings none; set --config.model.neck=none"
        )
    for name in names:
        PARTS[name].task.check(_own(name, config))
    _settings(config)


def _objectives(config: ml_collections.ConfigDict) -> tuple[Objective, ...]:
    return tuple(
        Objective(name, float(weight), functools.partial(_apply_one, name))
        for name, weight in config.objectives
    )


def _sum(amount: str, config: ml_collections.ConfigDict) -> int:
    """The sum over the objectives of a field of `Task` that is a function of the configuration."""
    return sum(getattr(PARTS[name].task, amount)(_own(name, config)) for name in _names(config))


MIXED = Task(
    fields=("objectives", *_FIELDS),
    offsets=_offsets,
    targets=_targets,
    reported=tuple(
        f"{name}/{score}" for name, part in PARTS.items() for score in ("loss", *part.task.reported)
    ),
    check=_check,
    build=_build,
    flops=functools.partial(_sum, "flops"),
    encoder=("encoder",),
    encoder_flops=functools.partial(_sum, "encoder_flops"),
    apply=_apply,
    baselines=lambda batch, keys, mean_image, config: {},
    teacher_flops=functools.partial(_sum, "teacher_flops"),
    after_step=_after_step,
    compares_batch=True,
    objectives=_objectives,
)
