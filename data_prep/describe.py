r"""What a dataset holds: cohort table, contact sheet, and checks.

    python -m data_prep.describe --dataset=DATASET [--verify [--audit_dir=DATASET-audit --input_dir=SCANS]]

Prints the table and writes cohort.csv and contact_sheet.png into --output_dir (default: DATASET-description). It ends
with exit code 1 if a table is damaged, with --verify if anything is wrong; with --audit_dir and --input_dir it also
searches the dataset for values of the source headers (see `data_prep.audit`).
"""

import collections
import csv
import io
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from data_prep.system import command_line
from data_prep.system.errors import InputError
from data_prep.system.files import written_whole

FLAGS = flags.FLAGS

_THIN_MM = 3.0
_TILE = 192
_LABEL_HEIGHT = 16
_MAX_COLUMNS = 6


def label_rows(
    volumes: list[dict[str, Any]],
    labels: dict[str, dict[str, Any]],
    slices: list[dict[str, Any]],
    of_volumes: list[dict[str, Any]],
    regions: list[dict[str, Any]],
) -> list[tuple[str, str, str]]:
    """(group, item, value) rows of a dataset with labels or masks: how many slices, volumes or patients there are of
    each class by split, and regions by split and malignancy. `labels` as in preparation.json; the rest are its tables.
    """
    split_of = {v["volume_id"]: v["split"] for v in volumes}
    patient_of = {v["volume_id"]: v["patient_id"] for v in volumes}
    splits = list(dict.fromkeys(split_of.values()))
    rows = []

    def add(group: str, item: str, found: list[str]) -> None:
        numbers = collections.Counter(found)
        rows.append((group, item, ", ".join(f"{split} {numbers[split]}" for split in splits)))

    for name, facts in labels.items():
        level = facts["level"]
        values = [(row["volume_id"], row[name]) for row in (slices if level == "slice" else of_volumes)]
        if level == "patient":  # one volume stands for its patient
            values = list({patient_of[volume]: (volume, value) for volume, value in values}.values())
        for index, text in [*enumerate(facts["classes"]), (None, "missing")]:
            found = [split_of[volume] for volume, value in values if value == index]
            if found or index is not None:
                add(f"Label {name} ({level}s)", text, found)
    if slices and "mask_area_px" in slices[0]:
        add("Masks", "slices with foreground", [split_of[row["volume_id"]] for row in slices if row["mask_area_px"]])
        add("Masks", "regions", [split_of[row["volume_id"]] for row in regions])
    for score in sorted({row["malignancy"] for row in regions if row.get("malignancy") is not None}):
        found = [split_of[row["volume_id"]] for row in regions if row["malignancy"] == score]
        add("Masks", f"nodules of malignancy {score}", found)
    return rows


def cohort_table(volumes: list[dict[str, Any]], rejected: list[dict[str, str]]) -> list[tuple[str, str, str]]:
    """(group, item, value) rows: the characteristics of the paper's Table I, and rejections by reason."""
    rows = [("Dataset", "Volumes, slices", _size(volumes))]
    thin = [v for v in volumes if v["slice_thickness_mm"] is not None and v["slice_thickness_mm"] < _THIN_MM]
    rows.append(("Dataset", "Slice thickness < 3 mm: volumes, slices", _size(thin)))
    at_limit = [v for v in volumes if v["slice_thickness_mm"] == _THIN_MM]
    rows.append(("Dataset", "Slice thickness 3 mm: volumes, slices", _size(at_limit)))
    rows.append(("Dataset", "Contrast-enhanced: volumes, slices", _size([v for v in volumes if v["contrast"]])))
    for split, number in collections.Counter(v["split"] for v in volumes).items():
        patients = {v["patient_id"] for v in volumes if v["split"] == split}
        rows.append(("Split", f"{split}: volumes, patients", f"{number}, {len(patients)}"))
    by_patient = {v["patient_id"]: v for v in volumes}  # one volume stands for its patient
    rows.append(("Patients", "Patients", str(len(by_patient))))
    ages = [v["age"] for v in by_patient.values() if v["age"] is not None]
    deviation = f" +/- {statistics.stdev(ages):.1f}" if len(ages) > 1 else ""
    age = f"{statistics.mean(ages):.1f}{deviation} years (of {len(ages)} patients)" if ages else "not recorded"
    rows.append(("Patients", "Age, mean +/- sd", age))
    for item, number in _counts(v["sex"] or "not recorded" for v in by_patient.values()):
        rows.append(("Sex", {"F": "Female", "M": "Male", "O": "Other"}.get(item, item), str(number)))
    for item, number in _counts(v["ethnic_group"] or "not recorded" for v in by_patient.values()):
        rows.append(("Ethnic group", item, str(number)))
    for item, number in _counts(v["manufacturer"].upper() or "NOT RECORDED" for v in volumes):
        rows.append(("Manufacturer", item, f"{number} volumes"))
    for item, number in _counts(note for v in volumes for note in v["notes"].split()):
        rows.append(("Noted", item, f"{number} volumes"))
    files = collections.Counter()
    for row in rejected:
        files[row["reason"]] += int(row["num_files"])
    for item, number in _counts(row["reason"] for row in rejected):
        rows.append(("Rejected", item, f"{number} series, {files[item]} files"))
    return rows


def _size(volumes: list[dict[str, Any]]) -> str:
    return f"{len(volumes)}, {sum(volume['num_slices'] for volume in volumes)}"


def _counts(items) -> list[tuple[str, int]]:
    return sorted(collections.Counter(items).items(), key=lambda item: (-item[1], item[0]))


def table_text(rows: list[tuple[str, str, str]], title: str) -> str:
    """The table as aligned text."""
    width = max(len(item) for _, item, _ in rows)
    lines, group = [title], None
    for name, item, value in rows:
        if name != group:
            lines.append(name)
            group = name
        lines.append(f"  {item:<{width}}  {value}")
    return "\n".join(lines)


def choose_slices(volumes: list[dict[str, Any]], number: int, random) -> list[tuple[dict[str, Any], int]]:
    """(volume, slice index) of random slices, one of each volume in turn; no slice twice before all were there."""
    order = random.permutation(len(volumes))[:number]
    chosen = []
    while len(chosen) < number:
        left = [(volumes[i], list(random.permutation(volumes[i]["num_slices"]))) for i in order]
        while left and len(chosen) < number:
            chosen += [(volume, int(indices.pop())) for volume, indices in left[: number - len(chosen)]]
            left = [(volume, indices) for volume, indices in left if indices]
    return chosen


def contact_sheet(dataset_dir: Path, num_slices: int, seed: int):
    """A PIL image of random slices (`choose_slices`), each labelled with volume, slice and split;
    labelled SYNTHETIC where the dataset is. Several windows stand side by side in each tile."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    from data_prep import dataset

    preparation = dataset.read_preparation(dataset_dir)
    volumes = dataset.read_volumes(dataset_dir)
    random = np.random.default_rng(seed)
    chosen = choose_slices(volumes, num_slices, random)
    tile_width = _TILE * preparation["channels"]
    columns = min(max(1, _MAX_COLUMNS // preparation["channels"]), num_slices)
    rows = -(-num_slices // columns)
    sheet = Image.new("L", (columns * tile_width, rows * (_TILE + _LABEL_HEIGHT) + 24), 0)
    draw = ImageDraw.Draw(sheet)
    windows = "  ".join(f"{w['level']:g}/{w['width']:g}" for w in preparation["windows"])
    title = f"{'SYNTHETIC  ' * preparation['synthetic']}window level/width {windows} HU"
    draw.text((4, 4), title, fill=255, font=ImageFont.load_default(14))
    font = ImageFont.load_default(11)
    sources = {split: dataset.open_split(dataset_dir, split) for split in preparation["splits"]}
    for number, (volume, index) in enumerate(chosen):
        image = sources[volume["split"]][volume["first_record"] + index]["image"]
        left = number % columns * tile_width
        top = number // columns * (_TILE + _LABEL_HEIGHT) + 24
        for channel in range(image.shape[-1]):
            tile = Image.fromarray(np.ascontiguousarray(image[..., channel])).resize((_TILE, _TILE))
            sheet.paste(tile, (left + channel * _TILE, top))
        label = f"{volume['volume_id'][:8]} {index + 1}/{volume['num_slices']} {volume['split']}"
        draw.text((left + 3, top + _TILE + 1), label, fill=255, font=font)
    return sheet


def main(argv: list[str]) -> int:
    from data_prep import dataset, stores

    dataset_dir = dataset.local_directory(FLAGS.dataset, dataset.read_preparation(FLAGS.dataset)["splits"])
    if bool(FLAGS.audit_dir) != bool(FLAGS.input_dir) or (FLAGS.audit_dir and not FLAGS.verify):
        raise InputError("--audit_dir and --input_dir belong together, and to --verify; give all three or none")
    preparation = dataset.read_preparation(dataset_dir)
    if FLAGS.audit_dir and "parts" in preparation:
        raise InputError(f"--dataset={dataset_dir}: was merged, so no one archive is its source; search each part")
    if problems := dataset.damaged_tables(dataset_dir, preparation):
        return _wrong(problems)
    volumes = dataset.read_volumes(dataset_dir)
    with open(dataset_dir / dataset.REJECTED_FILE, newline="") as file:
        rejected = list(csv.DictReader(file))
    rows = cohort_table(volumes, rejected)
    rows += label_rows(
        volumes,
        preparation["labels"],
        dataset.read_slices(dataset_dir),
        dataset.read_labels(dataset_dir),
        dataset.read_regions(dataset_dir),
    )
    synthetic = " (SYNTHETIC: a phantom, no patients)" * preparation["synthetic"]
    print(table_text(rows, f"{dataset_dir}{synthetic}"))
    for note in _grown_parts(dataset_dir, preparation):
        print(f"NOTE {note}")
    named = FLAGS.dataset.rstrip("/")
    output_dir = Path(FLAGS.output_dir or f"{named.rsplit('/', 1)[-1] if stores.is_url(named) else named}-description")
    output_dir.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("group", "item", "value"), *rows])
    with written_whole(output_dir / "cohort.csv") as temporary:
        temporary.write_text(text.getvalue())
    print(f"Written: {output_dir}/cohort.csv")
    if problems := _verify(dataset_dir) if FLAGS.verify else []:
        return _wrong(problems)
    with written_whole(output_dir / "contact_sheet.png") as temporary:
        contact_sheet(dataset_dir, FLAGS.num_slices, FLAGS.seed).save(temporary, "PNG")
    print(f"Written: {output_dir}/contact_sheet.png")
    return 0


def _wrong(problems: list[str]) -> int:
    for problem in problems:
        print(f"WRONG {problem}")
    return 1


def _grown_parts(dataset_dir: Path, preparation: dict[str, Any]) -> Iterator[str]:
    from data_prep import dataset

    for part, part_dir, _ in dataset.linked_parts(dataset_dir, preparation):
        if not (part_dir / dataset.PREPARATION_FILE).is_file():
            yield f"its part {part_dir} is not a complete dataset now: being changed, moved or removed"
        elif dataset.read_preparation(part_dir)["fingerprint"] != part["fingerprint"]:
            yield f"its part {part_dir} has grown since; data_prep.merge into a new directory takes in what came"


def _verify(dataset_dir: Path) -> list[str]:
    from data_prep.audit import find_leaks
    from data_prep.remote_archives import archive_directory
    from data_prep.verification import verify
    from data_prep.workers import WorkerPool, usable_cores

    with WorkerPool(FLAGS.num_workers or usable_cores()) as pool:
        problems = verify(dataset_dir, pool)
        if not problems:
            print("Verified: checksums, records, order, neighbours, tables.")
        if FLAGS.audit_dir:
            input_dir = archive_directory(FLAGS.input_dir)
            if not input_dir.is_dir():
                raise InputError(f"--input_dir={input_dir}: no such directory; give the folder of the scans")
            leaks = find_leaks(dataset_dir, input_dir, Path(FLAGS.audit_dir), pool)
            if not leaks:
                print("Verified: no identifying value of the source headers occurs in the dataset.")
            problems += leaks
    return problems


def define_flags() -> None:
    """Only where this module is the program: another one may define flags of the same names."""
    flags.DEFINE_string("dataset", None, "Dataset directory.", required=True)
    flags.DEFINE_string("output_dir", None, "Where the table and the contact sheet go (default: DATASET-description).")
    flags.DEFINE_integer("num_slices", 24, "Slices on the contact sheet.", lower_bound=1, upper_bound=400)
    flags.DEFINE_integer("seed", 0, "Of the choice of slices.")
    flags.DEFINE_bool("verify", False, "Check checksums, records and tables; exit code 1 if anything is wrong.")
    flags.DEFINE_string("audit_dir", None, "With --verify and --input_dir: search the dataset for identifying values.")
    flags.DEFINE_string("input_dir", None, "Directory of the scans that the dataset was made from.")
    flags.DEFINE_integer("num_workers", None, "Worker processes (default: the usable cores).", lower_bound=1)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
