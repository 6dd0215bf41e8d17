r"""How alike two sets of chest CT are: the statistics by which the phantom is tuned.

    python -m experiments.bench.phantom_statistics --dataset=REAL --output=real.json
    python -m experiments.bench.phantom_statistics --dataset=PHANTOM --output=phantom.json \
        --reference=real.json

Measures a dataset of one window, all splits, and writes JSON; with `--reference` (a JSON of this
command) it prints a Markdown table: both values, the tolerance, and whether the dataset lies
within. All are numbers of sets of patients: grey values 0 to 1 of the window, lengths in mm, and no
picture. `--flip=RESULTS` adds the flip AUROC of a model, fold by fold, from
RESULTS/fold_*/flip.json of `ctssl table2 run --folds=4 --cells=flip`.

The tolerance of a statistic is where other patients of the same kind would lie in 95 of 100 cases:
value ± t s sqrt(1 + n / m), with s the jackknife standard error over the n reference patients and m
patients in the other set; folds stand for patients in that of the flip AUROC. That of the histogram
is the 95 % quantile of the distance of m patients drawn from the reference to n drawn from it.
"""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from scipy import ndimage, stats

from data_prep.dataset.reader import Dataset
from data_prep.system import command_line
from data_prep.system.files import read_json, write_text

BINS = 64
DISTANCES_MM = (3.0, 6.0, 12.0, 24.0)
PATCH = 6  # pixels of a side, in which tissue is even enough to show noise
NOISE_SIZE = 128  # pixels of a slice; on coarser ones a patch of tissue holds edges of organs
QUIET = 0.1  # share of the patches, those of least variance
BANDS = (0.0, 0.2, 0.4, 0.72)  # limits in cycles a pixel
PARTS = 3  # of the height of the lungs, for mean slices
LUNG_GREY = 0.1
BOX = 32  # pixels of a side of a slice that is cut to the body


class Chest(NamedTuple):
    """What is measured of a patient.

    histogram: [BINS] shares of grey values; mean_slices: [PARTS, H, W]; bodies: the same, each cut
    to the body's box, [PARTS, BOX, BOX]; lung_litres None where the scan does not hold the whole
    lungs; differences: mean absolute difference of slices DISTANCES_MM apart; noise: standard
    deviation, correlation with the pixel beside and with the slice beside, and the share of power
    by band of BANDS.
    """

    histogram: np.ndarray
    mean_slices: np.ndarray
    bodies: np.ndarray
    grey: float
    lung_litres: float | None
    differences: np.ndarray
    noise: np.ndarray


def measure(images: np.ndarray, volume: Mapping[str, Any]) -> Chest:
    """Statistics of a volume.

    Args:
      images: [S, H, W] float32 in [0, 1], to superior.
      volume: its row of volumes.csv.
    """
    size = images.shape[1]
    pixel_mm2 = (
        volume["pixel_spacing_row_mm"]
        * volume["source_rows"]
        * volume["pixel_spacing_column_mm"]
        * volume["source_columns"]
        / size**2
    )
    spacing = volume["slice_spacing_mm"]
    first, last = volume["first_lung_slice"] or 0, volume["last_lung_slice"] or len(images) - 1
    parts = np.array_split(images[first : last + 1], PARTS)
    means = np.stack([part.mean(axis=0) for part in parts])
    lung = lung_mask(images)
    whole = first > 0 and last < len(images) - 1
    counts, _ = np.histogram(images, bins=BINS, range=(0, 1))
    return Chest(
        histogram=counts / counts.sum(),
        mean_slices=means,
        bodies=np.stack([cut_to_body(mean) for mean in means]),
        grey=float(images.mean()),
        lung_litres=float(lung.sum() * pixel_mm2 * spacing / 1e6) if whole else None,
        differences=slice_differences(images[first : last + 1], spacing),
        noise=noise(images[first : last + 1]),
    )


def cut_to_body(image: np.ndarray) -> np.ndarray:
    """[BOX, BOX]: the box of an image's largest region that is not dark, stretched."""
    parts, _ = ndimage.label(image > LUNG_GREY)
    box = ndimage.find_objects(parts)[np.argmax(np.bincount(parts.ravel())[1:])]
    cut = image[box]
    return ndimage.zoom(cut, (BOX / cut.shape[0], BOX / cut.shape[1]), order=1)


def lung_mask(images: np.ndarray) -> np.ndarray:
    """[S, H, W] bool: dark regions of each slice that do not reach its edge, opened."""
    cross = ndimage.generate_binary_structure(2, 1)
    lung = np.zeros(images.shape, bool)
    for index, dark in enumerate(images < LUNG_GREY):
        parts, _ = ndimage.label(dark, cross)
        edge = np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]])
        lung[index] = ndimage.binary_opening(dark & ~np.isin(parts, edge), cross)
    return lung


def slice_differences(images: np.ndarray, spacing_mm: float) -> np.ndarray:
    """[len(DISTANCES_MM)] mean absolute difference of slices that far apart, interpolated."""
    steps = range(1, math.ceil(max(DISTANCES_MM) / spacing_mm) + 1)
    means = [float(np.abs(images[n:] - images[:-n]).mean()) for n in steps if n < len(images)]
    at = spacing_mm * np.arange(len(means) + 1)
    return np.interp(DISTANCES_MM, at, [0.0, *means])


def noise(images: np.ndarray) -> np.ndarray:
    """Of the quietest patches of tissue without their slope: [standard deviation, correlation with
    the next pixel, with the next slice, share of power by band]."""
    side = images.shape[1] // 3 * 3 - PATCH
    places = [(r, c) for r in range(0, side, 3) for c in range(0, side, 3)]
    rows, columns = np.mgrid[:PATCH, :PATCH].reshape(2, -1) - (PATCH - 1) / 2
    slope = np.stack([np.ones(PATCH**2), rows, columns], axis=1)
    flatten = np.eye(PATCH**2) - slope @ np.linalg.pinv(slope)
    here, above = [], []
    for lower, upper in itertools.pairwise(images):
        pair = np.stack(
            [
                [image[r : r + PATCH, c : c + PATCH].ravel() for r, c in places]
                for image in (lower, upper)
            ]
        )
        tissue = ((pair > 0.02) & (pair < 0.98)).all(axis=(0, 2))
        here.append(pair[0, tissue] @ flatten)
        above.append(pair[1, tissue] @ flatten)
    patches, beside = np.concatenate(here), np.concatenate(above)
    quiet = np.argsort((patches**2).sum(axis=1))[: max(1, int(QUIET * len(patches)))]
    patches = patches[quiet].reshape(-1, PATCH, PATCH)
    beside = beside[quiet].reshape(-1, PATCH, PATCH)
    power = (np.abs(np.fft.fft2(patches)) ** 2).mean(axis=0)
    frequency = np.hypot(*np.meshgrid(*[np.fft.fftfreq(PATCH)] * 2))
    bands = [
        power[(frequency > low) & (frequency <= high)].sum()
        for low, high in itertools.pairwise(BANDS)
    ]
    variance = (patches**2).mean()
    return np.array(
        [
            math.sqrt(variance),
            (patches[:, :, 1:] * patches[:, :, :-1]).mean() / variance,
            (patches * beside).mean() / math.sqrt(variance * (beside**2).mean()),
            *(np.array(bands) / sum(bands)),
        ]
    )


def _mean_and_spread(
    name: str, of: Callable[[Chest], float | None]
) -> dict[str, Callable[[Sequence[Chest]], float]]:
    def values(chests: Sequence[Chest]) -> list[float]:
        return [value for chest in chests if (value := of(chest)) is not None]

    return {
        name: lambda chests: float(np.mean(values(chests))),
        f"{name}, sd between patients": lambda chests: float(np.std(values(chests), ddof=1)),
    }


NOISE_NAMES = (
    *("noise, sd", "noise, correlation with the next pixel"),
    "noise, correlation with the next slice",
    *(
        f"noise power, {low:g} to {high:g} cycles a pixel"
        for low, high in itertools.pairwise(BANDS)
    ),
)
STATISTICS: dict[str, Callable[[Sequence[Chest]], float]] = {
    **_mean_and_spread("mean grey", lambda chest: chest.grey),
    **{
        f"slices {distance:g} mm apart, mean absolute difference": (
            lambda chests, at=at: float(np.mean([chest.differences[at] for chest in chests]))
        )
        for at, distance in enumerate(DISTANCES_MM)
    },
    **{
        name: (lambda chests, at=at: float(np.mean([chest.noise[at] for chest in chests])))
        for at, name in enumerate(NOISE_NAMES)
    },
    **_mean_and_spread("lungs, litres", lambda chest: chest.lung_litres),
    "mean slices, sd between patients": lambda chests: float(
        np.std([chest.mean_slices for chest in chests], axis=0, ddof=1).mean()
    ),
    "mean slices cut to the body, sd between patients": lambda chests: float(
        np.std([chest.bodies for chest in chests], axis=0, ddof=1).mean()
    ),
}


def describe(chests: Sequence[Chest]) -> dict[str, Any]:
    """Value and jackknife standard error of every statistic, and the histograms of the patients."""
    result = {}
    n = len(chests)
    is_coarse = chests[0].mean_slices.shape[1] < NOISE_SIZE
    for name, statistic in STATISTICS.items():
        if name in NOISE_NAMES and is_coarse:
            continue
        without = [statistic([*chests[:i], *chests[i + 1 :]]) for i in range(n)]
        error = math.sqrt((n - 1) / n * float(np.sum((without - np.mean(without)) ** 2)))
        result[name] = {"value": statistic(chests), "error": error}
    histograms = [chest.histogram for chest in chests]
    return {
        "patients": n,
        "statistics": result,
        "histogram": np.mean(histograms, axis=0).tolist(),
        "histogram_tolerance": {str(m): _histogram_tolerance(histograms, m) for m in (3, n)},
    }


def histogram_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Wasserstein distance of two histograms of [0, 1], in grey values."""
    return float(np.abs(np.cumsum(np.asarray(a) - np.asarray(b))).sum() / BINS)


def _histogram_tolerance(histograms: Sequence[np.ndarray], number: int) -> float:
    draw = np.random.default_rng(0).integers
    n, all_of = len(histograms), np.array(histograms)
    distances = [
        histogram_distance(
            all_of[draw(0, n, number)].mean(axis=0), all_of[draw(0, n, n)].mean(axis=0)
        )
        for _ in range(500)
    ]
    return float(np.quantile(distances, 0.95))


def compare(found: Mapping[str, Any], reference: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of `name`, `reference`, `value`, `low`, `high` and `inside`."""
    n, m = reference["patients"], found["patients"]
    reach = float(stats.t.ppf(0.975, n - 1)) * math.sqrt(1 + n / m)
    distance = histogram_distance(found["histogram"], reference["histogram"])
    limit = reference["histogram_tolerance"][str(m if m == 3 else n)]
    rows = [_row("grey histogram, Wasserstein distance", 0.0, distance, 0.0, limit)]
    for name, known in reference["statistics"].items():
        value, half = found["statistics"][name]["value"], reach * known["error"]
        low, high = max(0.0, known["value"] - half), known["value"] + half
        rows.append(_row(name, known["value"], value, low, high))
    if "flip" in found and "flip" in reference:
        folds, others = reference["flip"], found["flip"]
        reach = float(stats.t.ppf(0.975, len(folds) - 1)) * math.sqrt(
            1 / len(folds) + 1 / len(others)
        )
        known, half = float(np.mean(folds)), reach * float(np.std(folds, ddof=1))
        value = float(np.mean(others))
        rows.append(_row("flip AUROC", known, value, known - half, min(1.0, known + half)))
    return rows


def _row(name: str, reference: float, value: float, low: float, high: float) -> dict[str, Any]:
    return {
        "name": name,
        "reference": reference,
        "value": value,
        "low": low,
        "high": high,
        "inside": low <= value <= high,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| statistic | reference | tolerance | measured | inside |", "|---|---|---|---|---|"]
    for row in rows:
        reference, low, high, value = (
            f"{row[k]:.3g}" for k in ("reference", "low", "high", "value")
        )
        inside = "yes" if row["inside"] else "**no**"
        lines.append(f"| {row['name']} | {reference} | {low} to {high} | {value} | {inside} |")
    return "\n".join(lines)


def chests_of(dataset: Dataset) -> list[Chest]:
    """Every volume of all splits, measured."""
    chests = []
    for split in dataset.preparation["splits"]:
        source = dataset.source(split)
        for volume in dataset.volumes(split):
            first = volume["first_record"]
            images = [source[first + i]["image"][..., 0] for i in range(volume["num_slices"])]
            chests.append(measure(np.stack(images).astype(np.float32) / 255, volume))
    return chests


def main(argv: list[str]) -> int:
    """Command line."""
    flag = flags.FLAGS
    dataset = Dataset.open(flag.dataset)
    facts = {name: dataset.preparation[name] for name in ("synthetic", "image_size", "windows")}
    found = {**facts, **describe(chests_of(dataset))}
    if flag.flip:
        results = sorted(Path(flag.flip).glob("fold_*/flip.json"))
        found["flip"] = [read_json(path)["metrics"]["auroc"]["mean"] for path in results]
    write_text(Path(flag.output), json.dumps(found, indent=1) + "\n")
    if flag.reference:
        print(table(compare(found, read_json(Path(flag.reference)))))
    return 0


def define_flags() -> None:
    """Only where this module is the program."""
    text = flags.DEFINE_string
    text("dataset", None, "Dataset directory.", required=True)
    text("output", None, "JSON file of the statistics.", required=True)
    text("reference", "", "JSON of this command to compare with.")
    text("flip", "", "Folder of fold_*/flip.json, results of ctssl table2.")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
