"""Scores of all slices of a split, and pictures of some slices, for validation and evaluation."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ctssl_jax.ops.embeddings import moments
from ctssl_jax.parallel.mesh import replicated, split_along_batch, to_devices
from ctssl_jax.training.state import Definition, TrainState, evaluation_keys


class Scorer(NamedTuple):
    """Compiled functions that score batches, for a state of any sharding.

    mesh: the devices.
    score_batch: (state, batch) -> values of `score_batch`; pictures stay split along the batch.
    replicate: a split tree -> a copy on every device of every host.
    """

    mesh: Mesh
    score_batch: jax.stages.Wrapped
    replicate: Callable


def make_scorer(definition: Definition) -> Scorer:
    """The `Scorer` of a model."""
    everywhere = replicated(definition.mesh)
    along_batch = split_along_batch(definition.mesh)
    return Scorer(
        mesh=definition.mesh,
        score_batch=jax.jit(
            functools.partial(score_batch, definition),
            # None takes any sharding: an evaluation has only a part of the state
            in_shardings=(None, along_batch),
            out_shardings=(everywhere, everywhere, along_batch),
        ),
        replicate=jax.jit(lambda tree: tree, out_shardings=everywhere),
    )


def score_batch(definition: Definition, state: TrainState, batch: dict) -> tuple[dict, dict, dict]:
    """Values of each slice, sums over the batch, and pictures [B, H, W, C]."""
    model = definition.model(state.params, state.variables)
    keys = evaluation_keys(batch["record_index"])
    output = definition.task.apply(model, batch, keys, None, definition.config, train=False)
    slices = {
        "record_index": batch["record_index"],
        "weight": batch["weight"],
        "scores": {"loss": output.loss, **output.scores},
        "classes": output.classes,
        "embedding": output.embedding,
    }
    totals = {
        "code_counts": output.code_counts,
        "embedding_moments": moments(output.embedding, batch["weight"]),
    }
    return slices, totals, output.pictures


class SplitScores(NamedTuple):
    """Scores of every slice of a split, sorted by record.

    record_index: [N] int32.
    scores: `loss` and the task's scores, each [N] float32.
    classes: `label` [N] int32 and `probabilities` [N, K] float32; None unless the task predicts a
      label.
    embedding: [N, D] float32; None unless they were asked for.
    code_counts: [num_codes] float64, over the split; None without a codebook.
    embedding_moments: sums over the slices' embeddings, see `ops.embeddings.moments`.
    """

    record_index: np.ndarray
    scores: dict[str, np.ndarray]
    classes: dict[str, np.ndarray] | None
    embedding: np.ndarray | None
    code_counts: np.ndarray | None
    embedding_moments: dict[str, np.ndarray]


def evaluate_split(
    scorer: Scorer,
    state: Any,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    embeddings: bool = False,
) -> SplitScores | None:
    """Score every slice of a split.

    Args:
      scorer: from `make_scorer`.
      state: a `TrainState`, of which only the model is used.
      batches: this process's slices, from `evaluation_batches`.
      embeddings: keep those of all slices, D numbers each.

    Returns:
      Equal values on every process; None if there was no batch.
    """
    pending, fetched = None, []
    for batch in batches:
        running = scorer.score_batch(state, to_devices(scorer.mesh, batch))[:2]
        if not embeddings:
            running[0]["embedding"] = None
        # fetched one batch later, so that the devices never wait for the host
        if pending is not None:
            fetched.append(jax.device_get(pending))
        pending = running
    if pending is None:
        return None
    fetched.append(jax.device_get(pending))
    slices = jax.tree.map(lambda *parts: np.concatenate(parts), *[slices for slices, _ in fetched])
    totals = jax.tree.map(
        lambda *parts: np.sum(parts, axis=0, dtype=float), *[totals for _, totals in fetched]
    )
    kept = np.flatnonzero(slices.pop("weight") > 0)
    kept = kept[np.argsort(slices["record_index"][kept], kind="stable")]
    return SplitScores(**jax.tree.map(lambda values: values[kept], slices), **totals)


def render_pictures(
    scorer: Scorer, state: Any, batch: dict[str, np.ndarray], number: int
) -> dict[str, np.ndarray]:
    """The task's pictures of the first `number` slices of a batch, each [number, H, W, C] float32
    in [0, 1]; and `label` [number] and `probabilities` [number, K] of a task with classes."""
    slices, _, pictures = scorer.score_batch(state, to_devices(scorer.mesh, batch))
    shown = {**scorer.replicate(pictures), **(slices["classes"] or {})}
    return {name: values[:number] for name, values in jax.device_get(shown).items()}
