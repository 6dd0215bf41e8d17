"""Next slice prediction and denoising without a model: which is harder, at which size and distance.

    ctssl without_training --dataset=AT_64 --dataset=AT_128 --output_dir=TABLE

For each prepared dataset of some slice size, of all its splits or those of --split:

- copy: the input slice as the prediction of the slice that lies about as far towards superior as
  --distances_mm says (0: the next one), never across a gap.
- fill: half of the pixels are white or black noise, as in `denoising`; each is replaced by the mean
  of its clean neighbours (Gaussian weights, sigma 0.6 pixels). It is told which pixels are noise.

Means over the slices of a volume, then over volumes, of grey values in [0, 1]; 95 % bootstrap
intervals by patient, widened for few; copy minus fill is paired by patient. No model is trained: a
model can learn more than both, but where copying errs most there is most to learn, and most that
cannot be known.
Writes without_training.md and .json (means over patients alone). Two minutes of one core
for 13 scans at 64, 128 and 256 pixels.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from data_prep.dataset.reader import Dataset
from data_prep.system import command_line
from data_prep.system.errors import InputError
from data_prep.system.files import make_folder, write_text
from data_prep.system.stores import local_path

from .study.results import markdown


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""

    def number(row: dict[str, Any], name: str, sign: str = "") -> str:
        if name not in row:
            return "-"
        low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
        bounds = "" if low is None else f" ({low:{sign}.4f} to {high:{sign}.4f})"
        return f"{row[name]:{sign}.4f}{bounds}"

    return markdown(
        [
            {
                "pixels": str(row["pixels"]),
                "without training": row["without training"],
                "distance, mm": "-" if row["mm"] is None else f"{row['mm']:.1f}",
                "MSE": number(row, "mse"),
                "SSIM": number(row, "ssim"),
                "MSE minus fill": number(row, "minus_fill", "+"),
                "patients": str(row["num_patients"]),
            }
            for row in rows
        ]
    )


def define_flags() -> None:
    """Only where this module is the program: others define flags of the same names."""
    flags.DEFINE_multi_string("dataset", [], "Prepared dataset; repeatable.")
    flags.DEFINE_string("output_dir", None, "Folder of the table.")
    flags.DEFINE_list("split", [], "Splits, separated by commas; by default all.")
    flags.DEFINE_list(
        "distances_mm", ["0", "4", "6", "10", "16"], "Of two slices; 0: of neighbours."
    )
    flags.DEFINE_integer("seed", 0, "Of the noise.")


def main(argv: list[str]) -> int:
    """Command line."""
    flag = flags.FLAGS
    if not flag.dataset:
        raise InputError("give --dataset=DIR, once for each slice size")
    if not flag.output_dir:
        raise InputError("give --output_dir=DIR")
    try:
        distances = [float(one) for one in flag.distances_mm]
    except ValueError as error:
        raise InputError(
            f"--distances_mm={','.join(flag.distances_mm)}: give numbers of mm"
        ) from error
    if not distances or not all(0 <= one < float("inf") for one in distances):
        raise InputError(f"--distances_mm={','.join(flag.distances_mm)}: give 0 or more")
    datasets = [Dataset.open(name) for name in flag.dataset]
    folder: Path = local_path(flag.output_dir, "--output_dir", "choose a folder here")
    make_folder(folder, "--output_dir")
    # not at the top: they import JAX, and --help should be fast
    from ctssl_jax.parallel.processes import configure_jax

    from .study import easy_answers

    configure_jax()
    rows: list[dict[str, Any]] = []
    for name, dataset in zip(flag.dataset, datasets, strict=True):
        splits = flag.split or dict.fromkeys(one["split"] for one in dataset.volumes())
        volumes = list(easy_answers.measured(dataset, list(splits), distances, flag.seed))
        if not volumes:
            raise InputError(f"--dataset={name} has no volume in {', '.join(splits)}; give others")
        rows += easy_answers.rows_of(dataset.preparation["image_size"], volumes)
        print(f"{name}: {len(volumes)} volumes", flush=True)
    write_text(folder / "without_training.md", table(rows))
    write_text(folder / "without_training.json", json.dumps(rows, indent=2) + "\n")
    print(f"\n{table(rows)}", flush=True)
    command_line.suggest("table2", "--help", aside=True)
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
