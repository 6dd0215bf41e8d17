"""Results of cells: reading them, and writing them as tables."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.system.files import read_json, written_whole

from .cells import Cell

UNCHECKED = (
    " Whether the models were trained on these patients CANNOT BE CHECKED (other pseudonym key)."
)


def with_spread(mean: float | None, sd: float | None) -> str:
    """A mean with its standard deviation, if there is one; empty without a mean."""
    return "" if mean is None else f"{mean:.4f}" + ("" if sd is None else f" ± {sd:.4f}")


def score(value: dict) -> str:
    """A metric of a results JSON: mean, standard deviation and 95 % interval."""
    interval = value["ci95"]
    text = "" if interval is None else f" ({interval[0]:.4f} to {interval[1]:.4f})"
    return with_spread(value["mean"], value["sd"]) + text


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """Rows with the same columns as a Markdown table; an empty cell is `missing`."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += [
        "| " + " | ".join(value or "missing" for value in row.values()) + " |" for row in rows
    ]
    return "\n".join(lines) + "\n"


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows with the same columns as CSV; None is empty."""
    with written_whole(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_result(cell: Cell) -> dict | None:
    """The results of a cell, kept ones first; None while it is missing."""
    if cell.kept is not None and cell.kept.exists():
        return read_json(cell.kept)
    return read_json(cell.result) if cell.result.exists() else None


def not_held_out(num_patients: int) -> str:
    """The warning that the evaluation has patients of the training."""
    return f" NOT HELD OUT: up to {num_patients} of these patients were in the training data."


def synthetic_warning(results: Sequence[dict]) -> str:
    """The first words of a caption, if a result is of synthetic data."""
    text = "computer-made scans, no patients; nothing here is a medical result."
    return f"**SYNTHETIC DATA: {text}** " if any(one["synthetic"] for one in results) else ""


def held_out_warning(results: Sequence[dict]) -> str:
    """What is known and what is not of patients that were in the training data, too."""
    seen = {result["num_patients_seen_in_training"] for result in results}
    known = max(seen - {None}, default=0)
    return (UNCHECKED if None in seen else "") + (not_held_out(known) if known else "")


def different_datasets(results: Sequence[dict]) -> str:
    """The last words of a caption, if the results cannot be compared; folds are different ones."""
    if any("folds" in result for result in results):
        return ""
    several = len({result["dataset_fingerprint"] for result in results}) > 1
    return " The results are of DIFFERENT datasets." if several else ""


def few_patients(number: int) -> str:
    """A sentence where the bootstrap intervals of single scores are too narrow: of 13 patients they
    miss the truth in 9 % of all cases, of 4 in 21 % (simulated, normal scores); "" above 20."""
    if number > 20:
        return ""
    return (
        f" Intervals of single scores of {number} patients do NOT cover 95 %; those of differences "
        "are widened."
    )


def caption(results: Sequence[dict]) -> str:
    """Data, sizes and training of the results in words; all values where they differ."""

    def common(values: Sequence[Any]) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values))

    numbers = [next(iter(result["metrics"].values())) for result in results]
    sides = [result["config"]["image_size"] for result in results]
    steps = sorted({result["config"]["num_steps"] for result in results})
    parts = [
        synthetic_warning(results),
        f"{common([result['split'] for result in results])} split, "
        f"{common([number['num_volumes'] for number in numbers])} volume(s) of "
        f"{common([number['num_patients'] for number in numbers])} patient(s), "
        f"{common([f'{side} x {side} pixels' for side in sides])}; ",
        f"{' / '.join(f'{number:,}' for number in steps)} training steps of batch "
        f"{common([result['config']['batch_size'] for result in results])}, seed "
        f"{common([result['seed'] for result in results])}, "
        f"{common([result['device'] for result in results])}.",
    ]
    parts.append(few_patients(min(number["num_patients"] for number in numbers)))
    return "".join([*parts, held_out_warning(results), different_datasets(results)])


def seconds_of(cell: Cell, workdir: Path) -> float | None:
    """Seconds of the last run of a cell, measured; None while it is missing or not known."""
    if cell.kept is not None and cell.kept.exists():
        return read_json(cell.kept)["seconds"]
    path = workdir / "seconds" / cell.name.replace("/", "-")
    return float(path.read_text()) if path.exists() else None
