"""Warnings in plain words of a collapse: of the codebook, of the embeddings or of a gradient."""

import ml_collections
import numpy as np

from ctssl_jax.ops.embeddings import effective_rank
from ctssl_jax.tasks.interface import is_frozen

FEWEST_DIRECTIONS = 2.0
SMALLEST_SHARE_OF_CODES = 0.05
SMALLEST_SHARE_OF_GRADIENT = 1e-6
# Settings that keep codes in use, in the order of their effect.
_LIVELY = {"vq_update": "ema", "vq_init": "data", "vq_revive_every": 50}
# `layer_of` those of DINO alone; in a mix, where the mask token of SparK is with them.
_PROTOTYPES = ("prototypes", "heads")


def embedding_use(moments: dict[str, np.ndarray]) -> dict[str, float]:
    """`effective_rank` of embeddings [N, D] from their `ops.embeddings.moments`, and D as
    `embedding_dim`."""
    return {"effective_rank": effective_rank(moments), "embedding_dim": len(moments["first"])}


def norms_of_learning(
    config: ml_collections.ConfigDict, step: int, layer_gradient_norms: dict[str, float]
) -> dict[str, float]:
    """The gradient norms of a report at this step without DINO's prototypes, as long as they were
    frozen in all steps of it."""
    if "teacher" not in config or step > config.teacher.frozen_steps:
        return layer_gradient_norms
    norms = layer_gradient_norms.items()
    return {layer: norm for layer, norm in norms if layer not in _PROTOTYPES}


def warnings(
    config: ml_collections.ConfigDict,
    use: dict[str, float],
    layer_gradient_norms: dict[str, float] | None = None,
) -> list[str]:
    """One line for each collapse; [] if there is none. A line names only settings that the run
    does not have already.

    Args:
      config: the run's configuration.
      use: `effective_rank` and `embedding_dim`; in a validation `pairwise_cosine` and
        `relative_sd`, see `ops.embeddings.spread`; with a codebook `used_codes`, `dead_codes` and
        `perplexity`.
      layer_gradient_norms: layer -> norm of its gradient, without layers that are not trained; None
        where no gradient was taken.
    """
    lines = []
    if use["effective_rank"] < min(FEWEST_DIRECTIONS, use["embedding_dim"]):
        lines.append(
            "the encoder has collapsed: the embeddings of all slices spread over "
            f"{use['effective_rank']:.1f} of {use['embedding_dim']} directions{_nearness(use)}, so "
            f"it hardly tells slices apart; {_encoder_remedy(config)}"
        )
    if "used_codes" in use:
        num_codes = use["used_codes"] + use["dead_codes"]
        if use["perplexity"] < 2 or use["used_codes"] < SMALLEST_SHARE_OF_CODES * num_codes:
            lines.append(
                f"the codebook has collapsed: {use['used_codes']} of {num_codes} codes are in use "
                f"(perplexity {use['perplexity']:.1f}); {_codebook_remedy(config)}"
            )
    norms = layer_gradient_norms or {}
    largest = max(norms.values(), default=0.0)
    silent = [
        layer for layer, norm in norms.items() if norm <= SMALLEST_SHARE_OF_GRADIENT * largest
    ]
    if silent:
        lines.append(
            "no gradient reaches "
            f"{', '.join(silent[:5])}{' and others' if len(silent) > 5 else ''}: these layers do "
            "not learn"
        )
    return lines


def _nearness(use: dict[str, float]) -> str:
    if "pairwise_cosine" not in use:
        return ""
    return (
        f" (mean cosine of two {use['pairwise_cosine']:.4f}, standard deviation "
        f"{use['relative_sd']:.2g} of their length)"
    )


def _encoder_remedy(config: ml_collections.ConfigDict) -> str:
    if is_frozen(config):
        return (
            "it is frozen: in a new run give it other weights by config.init_from, or train it by "
            "--config.encoder_learning_rate_factor=1"
        )
    remedies = ["a lower config.learning_rate", "a longer config.warmup_steps"]
    if "objectives" in config:
        remedies.insert(0, "a larger weight of a reconstruction in config.objectives")
    elif "regulariser" in config:
        remedies.insert(0, "a larger config.regulariser.weight")
    elif "teacher" in config:
        remedies.insert(0, "a lower config.teacher.temperature")
    elif "temperature" in config:
        remedies.insert(0, "more patients in a batch")
    elif "variance" in config.get("loss", ()):
        remedies.insert(0, "a larger config.loss.variance")
    return f"try {', '.join(remedies[:-1])}, or {remedies[-1]}"


def _codebook_remedy(config: ml_collections.ConfigDict) -> str:
    """The settings of `_LIVELY` that are not on, else those that can be turned further."""
    off = [
        f"--config.model.{name}={value}"
        for name, value in _LIVELY.items()
        if config.model[name] in ("gradient", "uniform", 0)
    ]
    if off:
        return f"in a new run {' '.join(off)} keeps them alive"
    return (
        "what keeps codes alive is on already: in a new run try a smaller config.model.num_codes, "
        "a smaller config.model.vq_revive_every or a lower config.learning_rate"
    )
