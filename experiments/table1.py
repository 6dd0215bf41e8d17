r"""Table I of the paper: the nodule cohort, counted from annotations, and prepared datasets.

    ctssl table1 --output_dir=TABLE1 \
        --annotations=LIDC-XML-only.tar --geometry=series_geometry.csv
    ctssl table1 --output_dir=TABLE1 --dataset=DATASET --dataset=OTHER

Writes table1.md and table1.csv. The first part counts the annotations of the readers; it needs no
images and takes half a minute. --geometry is a CSV with a line for each CT series and the columns
patient_id, series_instance_uid, slice_thickness_mm (DICOM (0018,0050)) and median_slice_spacing_mm
(of neighbouring slices, along the normal). The first scan of a patient counts: the scan of the
lowest scan_order, or without this column the first scan in the file. The defaults give the paper's
counts exactly, but for the number of volumes. The caption says what each line counts.

The second part has the numbers of `data_prep.describe` for each dataset; its files go to
OUTPUT_DIR/DATASET.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

import csv
from pathlib import Path

from absl import flags

from data_prep.labels import lidc
from data_prep.system import command_line
from data_prep.system.errors import InputError
from data_prep.system.files import explain, write_text
from data_prep.system.stores import local_path

from .study.lidc_counts import count, first_scan_votes, read_geometry
from .study.paper import TABLE1
from .study.results import markdown, write_csv
from .study.runner import run_stage, suggest_after


def lidc_rows(counted: dict[str, int], num_series: int) -> list[dict[str, str]]:
    """The lines of `TABLE1`, ours beside the paper's."""
    ours = {"Volumes": num_series, **counted}
    return [
        {"characteristic": name, "ours": f"{ours[name]:,}", "the paper's": f"{value:,}"}
        for name, value in TABLE1.items()
    ]


def caption(num_patients: int, consensus: float, min_area_px: int) -> str:
    """What the lines count."""
    return (
        f"Volumes: annotated CT series, of {num_patients:,} patients; all else is of a patient's "
        "first scan. A slice counts once for each nodule that it shows. A pixel is of a nodule "
        f"where a share of at least {consensus:g} of its annotations has it; a slice is kept where "
        f"the nodule has more than {min_area_px} pixels. The score is the median of the readers' "
        "(the upper one of an even number); above 3 cancer, below no cancer. A volume counts under "
        "each finding that it shows. Patients: with at least one kept nodule."
    )


def dataset_rows(dataset: Path, output_dir: Path) -> list[dict[str, str]]:
    """The numbers of `data_prep.describe` for a dataset, which it also writes into `output_dir`.

    Raises:
        InputError: it is not a dataset; the command has said why.
    """
    run_stage(
        f"characteristics of {dataset}",
        "data_prep.describe",
        f"--dataset={dataset}",
        f"--output_dir={output_dir}",
    )
    with open(output_dir / "cohort.csv", newline="") as file:
        return [
            {"group": row["group"], "characteristic": row["item"], "value": row["value"]}
            for row in csv.DictReader(file)
        ]


def define_flags() -> None:
    """Only where this module is the program."""
    flags.DEFINE_string(
        "annotations", None, "Folder or tar file of the XML annotations of LIDC-IDRI."
    )
    flags.DEFINE_string(
        "geometry", None, "CSV of slice thickness and spacing of the series (see above)."
    )
    flags.DEFINE_multi_string("dataset", [], "Prepared dataset; repeatable.")
    flags.DEFINE_string("output_dir", None, "Folder for table1.md and table1.csv.", required=True)
    flags.DEFINE_float(
        "consensus",
        lidc.CONSENSUS,
        "Share of a nodule's annotations that must have a voxel.",
        0.0,
        1.0,
    )
    flags.DEFINE_integer(
        "min_area_px", lidc.MIN_AREA_PX, "Slices with more pixels are kept.", lower_bound=0
    )
    flags.DEFINE_bool(
        "keep_excluded", False, "Also take the readings that the curated annotations leave out."
    )


def main(argv: list[str]) -> int:
    """Command line."""
    flag = flags.FLAGS
    if bool(flag.annotations) != bool(flag.geometry):
        raise InputError("--annotations and --geometry belong together; give both or neither")
    if not flag.annotations and not flag.dataset:
        raise InputError("nothing to count; give --annotations and --geometry, or --dataset")
    if flag.consensus == 0:
        raise InputError("--consensus=0 takes every voxel; give a share above 0")
    datasets = [local_path(name, "--dataset") for name in flag.dataset]
    if len({path.resolve().name for path in datasets}) < len(datasets):
        raise InputError(
            "two --dataset have the same folder name; rename one, their descriptions go to folders "
            "of it"
        )
    output_dir = local_path(flag.output_dir, "--output_dir", "choose a folder here")
    parts, table = ["# Table I: characteristics of the cohorts\n"], []
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if flag.annotations:
            geometry = read_geometry(local_path(flag.geometry, "--geometry"))
            readings = lidc.read_readings(local_path(flag.annotations, "--annotations"))
            patients = first_scan_votes(readings, geometry, keep_excluded=flag.keep_excluded)
            rows = lidc_rows(count(patients, flag.consensus, flag.min_area_px), len(readings))
            words = caption(len(patients), flag.consensus, flag.min_area_px)
            parts.append(f"## LIDC-IDRI\n\n{markdown(rows)}\n{words}\n")
            table += [
                {"cohort": "LIDC-IDRI", "group": "", "characteristic": row["characteristic"]}
                | {
                    "ours": row["ours"].replace(",", ""),
                    "paper": row["the paper's"].replace(",", ""),
                }
                for row in rows
            ]
    except OSError as error:
        raise InputError(explain(error)) from error
    for path in datasets:
        name = path.resolve().name
        rows = dataset_rows(path, output_dir / name)
        parts.append(f"## Dataset {name}\n\n{markdown(rows)}")
        table += [
            {"cohort": name, "group": row["group"], "characteristic": row["characteristic"]}
            | {"ours": row["value"], "paper": None}
            for row in rows
        ]
    text = "\n".join(parts)
    write_text(output_dir / "table1.md", text)
    write_csv(output_dir / "table1.csv", table)
    print(f"{text}\nWritten: {output_dir}/table1.md, {output_dir}/table1.csv", flush=True)
    suggest_after("draw", f"{__package__}.table1", [])
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
