"""A view of several datasets: a dataset directory whose shards are links to their shards."""

import collections
import errno
import itertools
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.dataset import merged_tables
from data_prep.dataset.reader import Dataset
from data_prep.dataset.schema import (
    LABELS_FILE,
    PREPARATION_FILE,
    REGIONS_FILE,
    REJECTED_COLUMNS,
    REJECTED_FILE,
    SLICES_FILE,
    SPLITS,
    VOLUME_COLUMNS,
    VOLUMES_FILE,
    make_preparation,
    rules_of,
    shard_name,
    split_shards,
    table_columns,
)
from data_prep.dataset.storage import write_table
from data_prep.dataset.tfds import complete
from data_prep.system.errors import InputError
from data_prep.system.files import lock_directory, make_folder, publish

_ALIKE = {  # of preparation.json -> the flag of `prepare` that decides it
    "windows": "--window",
    "image_size": "--image_size",
    "channels": "--window",
    "masks": "--masks_dir or --archive",
}


def merge(
    parts: Sequence[Dataset], output_dir: Path, link: str = "symlink"
) -> tuple[dict[str, Any], bool]:
    """Makes the view `output_dir` of datasets, in full or not at all. `link`: symlink, hard or
    copy.

    Returns the content of its preparation.json, and whether the view is new.

    Raises:
        InputError: datasets that do not go together, or an unusable output directory.
        DatasetError: a dataset is damaged.
        OSError: the view cannot be written.
    """
    if len(parts) < 2:
        raise InputError("--datasets: give two datasets or more, separated by commas")
    _refuse_nested_directories(parts, output_dir)
    if (output_dir / PREPARATION_FILE).exists():
        return _refuse_other_view(parts, output_dir, link), False
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise InputError(f"--output_dir={output_dir}: is not empty; choose a new directory")
    labels = _refuse_different_parts(parts)
    for part in parts:
        part.check_tables()  # `describe --verify` checks the shards

    final = output_dir.resolve()  # relative links start at the real place of the view
    building = final.with_name(f".{final.name}.merging")
    make_folder(building, "--output_dir")
    with lock_directory(building):
        for stale in building.iterdir():  # of a run that was killed
            stale.unlink()
        preparation = _write(parts, labels, building, final, link)
        publish(building, final)
    return preparation, True


# ---- refusals ------------------------------------------------------------------------------------


def _refuse_nested_directories(parts: Sequence[Dataset], output_dir: Path) -> None:
    for part in parts:
        a, b = part.directory.resolve(), output_dir.resolve()
        if a.is_relative_to(b) or b.is_relative_to(a):
            raise InputError(
                f"--output_dir={output_dir}: lies inside {part.directory}, or contains it; choose "
                "another"
            )
    directories = collections.Counter(part.directory.resolve() for part in parts)
    for part in parts:
        if directories[part.directory.resolve()] > 1:
            raise InputError(f"--datasets: {part.directory} is named twice; name it once")


def _refuse_other_view(parts: Sequence[Dataset], output_dir: Path, link: str) -> dict[str, Any]:
    """preparation.json of an existing view. Raises InputError unless it is the view of these
    parts."""
    preparation = Dataset.open(output_dir).preparation
    if "parts" not in preparation:
        raise InputError(
            f"--output_dir={output_dir}: is a dataset, not a view; choose a new directory"
        )
    remedy = (
        "merge into a new --output_dir, which takes a moment; runs on this one keep the volumes "
        "that it holds"
    )
    known = [part["fingerprint"] for part in preparation["parts"]]
    if len(known) != len(parts):
        raise InputError(
            f"{output_dir}: is a view of {len(known)} datasets, not of {len(parts)}; {remedy}"
        )
    for part, fingerprint in zip(parts, known, strict=True):
        if part.fingerprint != fingerprint:
            raise InputError(
                f"{output_dir}: {part.directory} has grown or was replaced since; {remedy}"
            )
    shards = [
        shard for split in preparation["splits"] for shard in split_shards(preparation, split)
    ]
    for shard in shards:
        path = output_dir / shard.name
        if not path.is_file():
            raise InputError(f"{path}: a shard is missing; {remedy}")
        if path.is_symlink() != (link == "symlink"):
            raise InputError(f"{output_dir}: was not made with --link={link}; {remedy}")
    return preparation


def _refuse_different_parts(parts: Sequence[Dataset]) -> dict[str, dict[str, Any]]:
    """`labels` of the view's preparation.json. Raises InputError if the parts cannot be one
    dataset."""
    first = parts[0]
    for other in parts[1:]:
        named = f"{first.directory} and {other.directory}"
        if first.preparation["key_fingerprint"] != other.preparation["key_fingerprint"]:
            raise InputError(
                f"{named} have different pseudonym keys, so their common patients are unknown; "
                "prepare both with one --pseudonym_key_file"
            )
        for name, flag in _ALIKE.items():
            values = [part.preparation[name] for part in (first, other)]
            if values[0] != values[1]:
                texts = [_text(value) for value in values]
                raise InputError(
                    f"{named} have different {name} ({texts[0]} and {texts[1]}); prepare them "
                    f"alike ({flag})"
                )
    labels: dict[str, dict[str, Any]] = {}
    of_label: dict[str, Dataset] = {}
    for part in parts:
        for name, facts in part.preparation["labels"].items():
            known, by = labels.setdefault(name, facts), of_label.setdefault(name, part)
            if known != facts:
                raise InputError(
                    f"the label {name} is of {_label_text(known)} in {by.directory} and of "
                    f"{_label_text(facts)} in {part.directory}; prepare one of them with that "
                    "column under another name, or with the same classes"
                )
    for first, other in itertools.combinations(parts, 2):
        _refuse_shared_volumes(first, other)
    return labels


def _refuse_shared_volumes(first: Dataset, other: Dataset) -> None:
    shared = {row["volume_id"] for row in first.volumes()} & {
        row["volume_id"] for row in other.volumes()
    }
    if shared:
        raise InputError(
            f"{len(shared)} volumes are in {first.directory} and in {other.directory}; leave one "
            "of the datasets out, or prepare the second without the scans of the first"
        )
    splits = {row["patient_id"]: row["split"] for row in first.volumes()}
    elsewhere = {row["patient_id"]: row["split"] for row in other.volumes()}
    differing = [
        patient for patient in splits if elsewhere.get(patient, splits[patient]) != splits[patient]
    ]
    if differing:
        raise InputError(
            f"{len(differing)} patients are in one split of {first.directory} and in another of "
            f"{other.directory}; prepare the second again with --same_splits_as={first.directory}"
        )


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(f"{window['level']:g},{window['width']:g}" for window in value)
    if isinstance(value, dict):
        return ",".join(f"{name}:{item}" for name, item in value.items())
    return "none" if value is None else str(value)


def _label_text(facts: Mapping[str, Any]) -> str:
    return f"{facts['level']}s with the classes {', '.join(facts['classes'])}"


# ---- the view ------------------------------------------------------------------------------------


def _write(
    parts: Sequence[Dataset],
    labels: Mapping[str, Mapping[str, Any]],
    building: Path,
    final: Path,
    link: str,
) -> dict[str, Any]:
    """Writes all files of the view, preparation.json last, into `building`, which becomes
    `final`."""
    images = parts[0].preparation
    masks = images["masks"]
    checksums, shard_lengths = _link_shards(parts, building, final, link)
    volumes = list(merged_tables.volume_rows(parts))
    cells = {name: collections.Counter() for name in labels}
    tables = {
        VOLUMES_FILE: (VOLUME_COLUMNS, volumes),
        REJECTED_FILE: (REJECTED_COLUMNS, merged_tables.rejected_rows(parts)),
    }
    rows = {
        SLICES_FILE: merged_tables.slice_rows(parts),
        LABELS_FILE: merged_tables.label_rows(parts, labels),
        REGIONS_FILE: merged_tables.region_rows(parts),
    }
    for name, columns in table_columns({"labels": labels, "masks": masks}).items():
        tables[name] = (columns, merged_tables.counted(rows[name], columns, cells))
    for name, (columns, of_table) in tables.items():
        write_table(building / name, columns, of_table)
    preparation = make_preparation(
        archive="+".join(dict.fromkeys(part.preparation["archive"] for part in parts)),
        windows=images["windows"],
        image_size=images["image_size"],
        volumes=volumes,
        shard_lengths=shard_lengths,
        labels=labels,
        masks=masks,
        key_fingerprint=images["key_fingerprint"],
        parts=[_part_facts(part) for part in parts],
        options=_options(parts),
        versions=_common([part.preparation["versions"] for part in parts]),
        counts=_counts(parts, labels, cells),
        rules=_rules(parts),
    )
    return complete(building, preparation, tables, checksums)


def _link_shards(
    parts: Sequence[Dataset], building: Path, final: Path, link: str
) -> tuple[dict[str, str], dict[str, list[int]]]:
    """Links all shards. Returns {shard: checksum}, as the parts list them, and {split: records of
    each shard}."""
    checksums, shard_lengths = {}, {}
    for split in SPLITS:
        for part in parts:
            if split not in part.preparation["splits"]:
                continue
            lengths = shard_lengths.setdefault(split, [])
            for shard in split_shards(part.preparation, split):
                name = shard_name(split, len(lengths))
                _link(part.directory.resolve() / shard.name, building / name, final, link)
                checksums[name] = part.preparation["checksums"][shard.name]
                lengths.append(shard.num_records)
    return checksums, shard_lengths


def _link(source: Path, path: Path, final: Path, link: str) -> None:
    try:
        if link == "symlink":
            path.symlink_to(os.path.relpath(source, final))
        elif link == "hard":
            path.hardlink_to(source.resolve())
        else:
            shutil.copyfile(source, path)
    except OSError as error:
        if link == "copy" or error.errno not in (
            errno.EXDEV,
            errno.EPERM,
            errno.EOPNOTSUPP,
            errno.EMLINK,
        ):
            raise
        raise InputError(
            f"{path.parent}: {error.strerror}: no --link={link} here; give another --link"
        ) from None


def _counts(
    parts: Sequence[Dataset],
    labels: Mapping[str, Mapping[str, Any]],
    cells: Mapping[str, collections.Counter],
) -> dict[str, Any]:
    """Sums of the parts' counts, and the cells of labels by class."""
    total: dict[str, Any] = {}
    for part in parts:
        total = _sum(
            total, {name: n for name, n in part.preparation["counts"].items() if name != "labels"}
        )
    of_labels = {}
    for name, facts in labels.items():
        numbers = cells[name]
        by_class = {text: numbers[str(index)] for index, text in enumerate(facts["classes"])}
        of_labels[name] = by_class | {"missing": numbers[""]}
    return total | ({"labels": of_labels} if of_labels else {})


def _rules(parts: Sequence[Dataset]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in parts:
        total = _sum(total, rules_of(part.preparation, len(part.volumes())))
    return total


def _sum(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Sums numbers name by name, also in nested dictionaries."""
    added = {
        n: _sum(a.get(n, {}), value) if isinstance(value, dict) else a.get(n, 0) + value
        for n, value in b.items()
    }
    return dict(a) | added


def _options(parts: Sequence[Dataset]) -> dict[str, Any]:
    """The options that all parts share, and the tables of all parts. preparation.json lists the
    other options under `parts`."""
    options = [part.preparation["options"] for part in parts]
    tables = [table for of_part in options for table in of_part.get("tables", [])]
    return _common(options) | {
        "tables": [table for n, table in enumerate(tables) if table not in tables[:n]]
    }


def _common(dictionaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first, *rest = dictionaries
    return {
        name: v
        for name, v in first.items()
        if all(name in other and other[name] == v for other in rest)
    }


def _part_facts(part: Dataset) -> dict[str, Any]:
    """An entry of `parts` in preparation.json. It names no path, since a view is as public as its
    parts: the links show the directory."""
    names = ("fingerprint", "archive", "synthetic", "options", "rules", "versions", "parts")
    facts = {name: part.preparation[name] for name in names if name in part.preparation}
    shards = {
        split: len(of_split["shard_lengths"])
        for split, of_split in part.preparation["splits"].items()
    }
    return facts | {"num_volumes": len(part.volumes()), "num_shards": shards}
