"""Table I from the annotations of all scans of LIDC-IDRI: the counts of the paper come out exactly.

    python -m tests.campaigns.lidc_counts --annotations=FOLDER

FOLDER holds `tcia-lidc-xml_all1318.tar.xz`, `LIDC-IDRI_MetaData.csv` and `series_geometry.csv`.
Takes about a minute. The tests count a part of the same scans.
"""

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from data_prep.labels import lidc
from experiments.study import lidc_counts

PAPER = {
    "Slices": 10005,
    "Cancer: volumes": 388,
    "Ambiguous: volumes": 547,
    "No cancer: volumes": 394,
    "Malignancy score 1: slices": 923,
    "Malignancy score 2: slices": 1114,
    "Malignancy score 3: slices": 3473,
    "Malignancy score 4: slices": 2126,
    "Malignancy score 5: slices": 2369,
    "Patients": 840,
}


def comparisons(folder: Path) -> Iterator[tuple[str, object, object]]:
    """(what is compared, counted, expected)."""
    readings = lidc.read_readings(folder / "tcia-lidc-xml_all1318.tar.xz")
    geometry = lidc_counts.read_geometry(folder / "series_geometry.csv")
    with open(folder / "LIDC-IDRI_MetaData.csv", newline="") as file:
        collection = {
            row["Series UID"]: row["Patient Id"]
            for row in csv.DictReader(file)
            if row["Modality"] == "CT"
        }
    yield "number of series", len(readings), 1018
    yield "series of the annotations and of the collection", readings.keys(), collection.keys()
    yield (
        "patients of the series",
        {one.series_instance_uid: one.patient_id for one in geometry},
        collection,
    )
    contours = [
        len(nodule.contours)
        for one in readings.values()
        for session in one.sessions
        for nodule in session
    ]
    # one is excluded below
    yield "readings and contours", (len(contours), sum(contours)), (6859 + 1, 41406 + 23)
    patients = lidc_counts.first_scan_votes(readings, geometry)
    yield "number of patients", len(patients), 1010
    yield "Table I", lidc_counts.count(patients, 0.7, 20), PAPER
    weaker = lidc_counts.count(patients, 0.5, 8)  # a common rule with a weaker consensus
    yield (
        "slices and patients of the weaker rule",
        (weaker["Slices"], weaker["Patients"]),
        (13916, 875),
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--annotations", type=Path, required=True, help="folder with the three files"
    )
    wrong = 0
    for name, counted, expected in comparisons(parser.parse_args().annotations):
        wrong += counted != expected
        print(f"{'equal' if counted == expected else 'WRONG'}  {name}", flush=True)
        if counted != expected:
            print(f"  counted:  {counted}\n  expected: {expected}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
