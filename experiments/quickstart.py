r"""The whole path on one machine in minutes: scans, dataset, pretraining, evaluation, a report.

    ctssl quickstart                          # makes synthetic chest CT first
    ctssl quickstart --input_dir=MY_DICOM     # the same on your own scans

Every stage is one command that is printed and that you can run yourself. Run it again after an
interruption: finished stages are kept, unfinished stages continue.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

import csv
import json
from pathlib import Path

from absl import flags

from data_prep.pipeline.options import parse_splits
from data_prep.system import command_line
from data_prep.system.errors import InputError
from data_prep.system.files import read_json, write_text
from data_prep.system.stores import local_path

from .study.quickstart_report import compared, improvement, loss_curve, report_html
from .study.runner import run_stage

RECIPE = "masked_region:small"
IMAGE_SIZE = 64
# Half of the recipe's batch: at the same cost more and smaller steps come further in few minutes.
TRAINING = {
    "num_steps": 3_200,
    "batch_size": 8,
    "optimizer": "adamw",
    "learning_rate": 4e-3,
}


class StageTimes:
    """Seconds of each stage, kept in a file: the longest run of a stage counts, since a later one
    does nothing."""

    def __init__(self, path: Path):
        self._path = path
        self.known: dict[str, float] = read_json(path) if path.exists() else {}

    def __setitem__(self, stage: str, duration: float) -> None:
        self.known[stage] = max(duration, self.known.get(stage, 0.0))
        write_text(self._path, json.dumps(self.known))


def define_flags() -> None:
    """Only where this module is the program: another one may define flags of the same names."""
    flags.DEFINE_string("output_dir", "runs/quickstart", "Folder for everything that is made.")
    flags.DEFINE_string("input_dir", "", "Your archive; by default a synthetic one is made.")
    flags.DEFINE_enum("archive", "dicom", ["dicom", "nifti"], "Kind of the archive.")
    flags.DEFINE_integer("num_patients", 96, "Patients of the synthetic archive.")
    flags.DEFINE_integer("num_slices", 20, "Slices of each synthetic scan.")
    flags.DEFINE_string(
        "splits",
        "",
        "Fractions of patients for training, validation and test; by default 0.7,0.15,0.15 of a "
        "synthetic archive and 0.8,0.1,0.1 of yours. Of two patients: 0.5,0.5,0 (the validation "
        "patient is measured); of one: 1,0,0 (the dataset alone).",
    )
    flags.DEFINE_integer(
        "num_steps", TRAINING["num_steps"], "Training steps, of 8 slices each.", lower_bound=1
    )
    flags.DEFINE_integer(
        "seed", 0, "Of the synthetic archive, the weights and the order of slices."
    )
    flags.DEFINE_string(
        "pseudonym_key_file",
        "",
        "Key of the pseudonyms, which also decides the splits; by default a new one is made.",
    )


def main(argv: list[str]) -> int:
    """Command line."""
    flag = flags.FLAGS
    output = local_path(flag.output_dir, "--output_dir", "choose a folder here")
    source = local_path(flag.input_dir, "--input_dir") if flag.input_dir else None
    if source and not source.is_dir():
        raise InputError(f"--input_dir={source}: no such folder")
    if flag.archive != "dicom" and source is None:
        raise InputError(f"--archive={flag.archive} is of your scans; give --input_dir, too")
    splits = flag.splits or ("" if source else "0.7,0.15,0.15")
    num_splits = sum(share > 0 for share in parse_splits(splits)) if splits else 3
    if flag.num_patients < num_splits:
        raise InputError(
            f"--num_patients={flag.num_patients}: {num_splits} splits take {num_splits} patients or"
            " more; give more, or other --splits (see --help)"
        )
    shares = [f"--splits={splits}"] if splits else []
    training = {**TRAINING, "num_steps": flag.num_steps}
    archive, dataset, run = output / "dicom", output / "dataset", output / "run"
    result_file = output / "result.json"
    seconds = StageTimes(output / "seconds.json")
    if source is None:
        seconds["making scans"] = run_stage(
            "1 of 5: make a synthetic chest CT archive",
            "data_prep.phantom",
            f"--output_dir={archive}",
            f"--num_patients={flag.num_patients}",
            f"--num_slices={flag.num_slices}",
            f"--image_size={2 * IMAGE_SIZE}",
            "--field=lungs",  # more of the chest in 64 pixels
            f"--seed={flag.seed}",
        )
    seconds["preparation"] = run_stage(
        "2 of 5: scans to windowed slices",
        "data_prep.prepare",
        f"--archive={flag.archive}",
        f"--input_dir={source or archive}",
        f"--output_dir={dataset}",
        f"--image_size={IMAGE_SIZE}",
        *shares,
        *([f"--pseudonym_key_file={key}"] if (key := flag.pseudonym_key_file) else []),
    )
    run_stage(
        "3 of 5: describe and verify the dataset",
        "data_prep.describe",
        f"--dataset={dataset}",
        f"--output_dir={output / 'cohort'}",
        "--verify",
    )
    held_out = read_json(dataset / "preparation.json")["splits"]
    if "validation" not in held_out:
        print(
            f"\nThe dataset is made, and --splits={splits} ends here: a training takes a patient "
            "for validation, and a test one more; three patients or more need no --splits.\n"
            f"Cohort table and contact sheet: {output / 'cohort'}",
            flush=True,
        )
        command_line.suggest("describe", f"--dataset={dataset}", "--html")
        return 0
    split = "test" if "test" in held_out else "validation"
    seconds["training"] = run_stage(
        "4 of 5: pretrain by masked region prediction",
        "ctssl_jax.train",
        f"--config={RECIPE}",
        f"--config.dataset={dataset}",
        f"--config.seed={flag.seed}",
        *(f"--config.{name}={value}" for name, value in training.items()),
        f"--workdir={run}",
    )
    seconds["evaluation"] = run_stage(
        f"5 of 5: evaluate on {'held-out' if split == 'test' else 'validation'} patients",
        "ctssl_jax.evaluate",
        f"--workdir={run}",
        f"--dataset={dataset}",
        f"--split={split}",
        f"--output={result_file}",
        "--baselines",
    )

    from ctssl_jax.runs.reports import read_reports

    result = read_json(result_file)
    with open(output / "cohort" / "cohort.csv", newline="") as file:
        cohort = list(csv.DictReader(file))
    page = report_html(
        result,
        cohort,
        seconds.known,
        loss_curve(read_reports(run, "train"), read_reports(run, "validation")),
        result_file.with_suffix(".png").read_bytes(),
        (output / "cohort" / "contact_sheet.png").read_bytes(),
    )
    write_text(output / "report.html", page)
    factors = improvement(result)
    print(
        f"\nInside the masked square the model's error is {compared(factors['mean_image'])} the "
        f"mean slice's and {compared(factors['copy_input'])} the masked input's"
        + (" (SYNTHETIC data)" if result["synthetic"] else "")
        + f".\nReport: {output / 'report.html'}   ({sum(seconds.known.values()):.0f} s)",
        flush=True,
    )
    if source is None:
        command_line.suggest("quickstart", "--input_dir=MY_DICOM", f"--output_dir={output}-mine")
    else:
        scans = [f"--archive={flag.archive}", f"--input_dir={source}"]
        whole = [f"--output_dir={output / 'dataset512'}", "--image_size=512", *shares]
        command_line.suggest("prepare", *scans, *whole)
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
