"""Warnings in plain words of a collapse: of the codebook, of the embeddings or of a gradient."""

import numpy as np

from ctssl_jax.ops.embeddings import effective_rank

FEWEST_DIRECTIONS = 2.0
SMALLEST_SHARE_OF_CODES = 0.05
SMALLEST_SHARE_OF_GRADIENT = 1e-6


def embedding_use(moments: dict[str, np.ndarray]) -> dict[str, float]:
    """`effective_rank` of embeddings [N, D] from their `ops.embeddings.moments`, and D as
    `embedding_dim`."""
    return {"effective_rank": effective_rank(moments), "embedding_dim": len(moments["first"])}


def warnings(
    use: dict[str, float], layer_gradient_norms: dict[str, float] | None = None
) -> list[str]:
    """One line for each collapse; [] if there is none.

    Args:
      use: `effective_rank` and `embedding_dim`, and with a codebook `used_codes`, `dead_codes` and
        `perplexity`.
      layer_gradient_norms: layer -> norm of its gradient; None where no gradient was taken.
    """
    lines = []
    if use["effective_rank"] < min(FEWEST_DIRECTIONS, use["embedding_dim"]):
        lines.append(
            "the encoder has collapsed: the embeddings of all slices spread over "
            f"{use['effective_rank']:.1f} of {use['embedding_dim']} directions, so it hardly tells "
            "slices apart; try a lower config.learning_rate, or a longer config.warmup_steps"
        )
    if "used_codes" in use:
        num_codes = use["used_codes"] + use["dead_codes"]
        if use["perplexity"] < 2 or use["used_codes"] < SMALLEST_SHARE_OF_CODES * num_codes:
            lines.append(
                f"the codebook has collapsed: {use['used_codes']} of {num_codes} codes are in use "
                f"(perplexity {use['perplexity']:.1f}); in a new run --config.model.vq_update=ema "
                "--config.model.vq_init=data --config.model.vq_revive_every=50 keeps them alive"
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
