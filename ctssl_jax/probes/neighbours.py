"""The slices of other patients that a frozen encoder finds most like a slice, as a picture."""

from pathlib import Path
from typing import Any

import numpy as np
from sklearn.preprocessing import StandardScaler

from ctssl_jax.data.slices import open_source
from ctssl_jax.parallel import batch_sizes
from ctssl_jax.probes.encoders import WITH_STATISTICS, ProbedRun
from ctssl_jax.probes.probing import placed_slices
from ctssl_jax.runs import strips
from ctssl_jax.stats.label_free import relative_position
from ctssl_jax.stats.volumes import volumes_of_records
from ctssl_jax.training import pictures
from data_prep.system.errors import InputError
from data_prep.system.files import make_folder
from data_prep.system.stores import local_path

NUMBER = 5  # of neighbours


def spread_queries(volume: np.ndarray, place: np.ndarray, number: int) -> np.ndarray:
    """Slices to ask for, spread over the volumes and, from low to high, over the places in them.

    Args:
      volume: [N] int, the number of each slice's volume, from 0.
      place: [N] of each slice in its volume, in [0, 1].
      number: Q.

    Returns:
      [Q] int, places in the arrays; one slice may be asked for twice where there are few.
    """
    wanted = (np.arange(number) + 0.5) / number
    of_volume = (wanted * (np.max(volume) + 1)).astype(int)
    distance = np.abs(place - wanted[:, None])
    return np.argmin(np.where(volume == of_volume[:, None], distance, np.inf), axis=1)


def nearest(features: np.ndarray, patient: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The nearest slices of other patients by cosine of standardised features.

    Args:
      features: [N, F] float.
      patient: [N], the patient of each slice.
      queries: [Q] int, places of slices that are asked for.

    Returns:
      [Q, K] int, the most like first; K is `NUMBER`, or less where other patients have fewer.
    """
    scaled = StandardScaler().fit_transform(np.asarray(features, np.float64))
    lengths = np.linalg.norm(scaled, axis=1, keepdims=True)
    unit = scaled / np.where(lengths > 0, lengths, 1)
    likeness = unit[queries] @ unit.T
    likeness[patient[queries][:, None] == patient[None]] = -np.inf
    fewest = np.isfinite(likeness).sum(axis=1).min()
    return np.argsort(-likeness, axis=1, kind="stable")[:, : min(NUMBER, fewest)]


def neighbours(
    workdir: str | Path,
    dataset: str | Path | None,
    output: str | Path,
    *,
    split: str = "test",
    checkpoint: str = "best",
    encoder: str = "run",
    num_slices: int = 6,
    batch_size: int = 0,
) -> dict[str, Any]:
    """Draw slices and, beside each, the most like ones of other patients.

    Args:
      workdir: run directory, of any task whose model has the encoder.
      dataset: dataset directory; None takes the dataset of the training.
      output: of the PNG.
      split: that is searched.
      checkpoint: `best`, `last`, `last_good` or a step; the controls read no checkpoint.
      encoder: name in `ENCODERS`.
      num_slices: rows, see `spread_queries`.
      batch_size: slices at a time at most; 0 chooses by memory.

    Returns:
      {"places": [Q] of the slices, "found": [Q, K] of their neighbours}, each from 0 (the lowest
      slice of its volume) to 1 (the highest); NaN for the only one.

    Raises:
      InputError: an unknown run, checkpoint or encoder, or slices of one patient alone.
    """
    output = local_path(output, "--output", "choose a folder here")
    if output.suffix != ".png":
        raise InputError(f"--output={output} must end in .png")
    splits = ("train", split) if encoder in WITH_STATISTICS else (split,)
    probed = ProbedRun.open(
        workdir,
        dataset,
        output.with_suffix(".json"),
        splits,
        encoder=encoder,
        checkpoint=checkpoint,
        batch_size=batch_size,
    )
    measured = probed.measured
    source = open_source(measured.dataset, split, measured.channels, (0,))
    patients = np.array([volume["patient_id"] for volume in source.volumes])
    if len(set(patients)) < 2:
        raise InputError(
            f"--split={split} of {measured.dataset.name} has slices of one patient alone, so none "
            "can be found in others; give another split or a --dataset of more patients"
        )
    make_folder(output.parent, "--output")
    training = source
    if encoder in WITH_STATISTICS:
        training = open_source(measured.dataset, "train", measured.channels, (0,))
    frozen = probed.load_encoder(training)
    size = probed.batch_size(frozen, len(source))
    with batch_sizes.end_of_memory(size):
        slices, record_index = placed_slices(frozen, source, size)
    volumes, index = volumes_of_records(source.volumes, record_index)
    patient = np.array([volume["patient_id"] for volume in volumes])[index]
    place = relative_position(slices)
    queries = spread_queries(index, place, num_slices)
    found = nearest(slices.embedding, patient, queries)

    shown = source.channel(record_index, measured.channels[0])[..., None].astype(np.float32) / 255
    columns = {"input": shown[queries]}
    for number in range(found.shape[1]):
        columns[f"of others, {number + 1}"] = shown[found[:, number]]
    legend = pictures.setting(
        measured.config, measured.dataset, measured.channels, source, record_index[queries]
    ).legend
    rows = [
        f"at {_in_words(place[query])}; found {' '.join(map(_in_words, place[of_query]))}"
        for query, of_query in zip(queries, found, strict=True)
    ]
    note = (
        f"{measured.config.recipe}, {encoder}: the most like slices of other patients. Places: 0 "
        f"is the lowest slice of a scan, 1 the highest, - the only one. {legend.note}"
    )
    strips.save_strip(output, columns, legend._replace(note=note, rows=tuple(rows)))
    return {"places": place[queries].tolist(), "found": place[found].tolist()}


def _in_words(place: float) -> str:
    """Of a slice; a volume of one place has none."""
    return "-" if np.isnan(place) else f"{place:.2f}"
