"""Options and directories of a preparation; comparison with the options of an earlier run."""

import dataclasses
import hashlib
import itertools
import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.dataset.reader import Dataset
from data_prep.dataset.schema import PREPARATION_FILE, VOLUMES_FILE
from data_prep.pipeline import dask_cluster
from data_prep.privacy.pseudonyms import KEY_FILE, key_fingerprint
from data_prep.scan.archives import ArchiveDirectory, RemoteArchive
from data_prep.scan.rules import VERSION, Rules
from data_prep.system.errors import InputError
from data_prep.system.extras import require
from data_prep.system.files import make_folder, read_json, write_file

_SPLITS_FILE = "splits.json"  # patient -> split
_PATIENTS_FILE = "patients.json"  # `KnownPatients`; missing if there are none
_BOUND_FILE = "archive.json"  # names the archive and the dataset of an audit directory
_MULTIPLE = 4  # of pixels, the side of images


@dataclasses.dataclass(frozen=True)
class Options:
    """The options that decide the bytes of a dataset, with the archive and the pseudonym key."""

    archive: str = "dicom"
    # (level, width) in HU, a channel each
    windows: tuple[tuple[float, float], ...] = ((50.0, 350.0),)
    image_size: int = 512
    rules: Rules = dataclasses.field(default_factory=Rules)
    splits: tuple[float, float, float] = (0.8, 0.1, 0.1)  # fractions of patients
    holdout_volumes: int = 0  # test volumes; 0: go by `splits`
    shard_size_mb: float = 1024.0
    masks: dict[str, Any] | None = None  # `LabelSources.mask_facts`
    # (option, keyed digest) of each file of labels and attributes
    tables: tuple[tuple[str, str], ...] = ()
    # fingerprints of other datasets, as they were when splits were decided
    same_splits_as: tuple[str, ...] = ()

    def __post_init__(self):
        if self.image_size % _MULTIPLE:
            near = max(_MULTIPLE, round(self.image_size / _MULTIPLE) * _MULTIPLE)
            raise InputError(
                f"--image_size={self.image_size}: must be a multiple of {_MULTIPLE}, since the "
                f"encoder halves images twice; give {near}"
            )

    def as_dict(self) -> dict[str, Any]:
        """Flat and in the types that JSON gives back."""
        fields = dataclasses.asdict(self)
        fields = fields | fields.pop("rules")
        if not self.same_splits_as:
            del fields["same_splits_as"]
        return json.loads(json.dumps(fields))

    def conversion_digest(self) -> str:
        """Digest of the options and the version of the rules that decide the conversion of an exam.
        The splits are not among them."""
        relevant = (
            VERSION,
            self.archive,
            self.windows,
            self.image_size,
            dataclasses.astuple(self.rules),
        )
        return hashlib.sha256(repr((*relevant, self.masks, self.tables)).encode()).hexdigest()


def parse_splits(text: str) -> tuple[float, float, float]:
    """Three fractions that sum to 1, the first above 0. Raises InputError."""
    remedy = "give three fractions that sum to 1, such as --splits=0.8,0.1,0.1"
    try:
        train, validation, test = (float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--splits={text}: {remedy}") from None
    if not (
        train > 0 and validation >= 0 and test >= 0 and abs(train + validation + test - 1) < 1e-6
    ):
        raise InputError(f"--splits={text}: {remedy}, the first above 0")
    return train, validation, test


def parse_megabytes(number: float) -> float:
    """The size of a shard. Raises InputError."""
    if not number > 0:
        raise InputError(f"--shard_size_mb={number:g}: give a number of megabytes above 0")
    return number


def parse_beam_options(
    runner: str, text: str, dask_scheduler: str | None = None
) -> list[str] | None:
    """The words of --beam_options, and with --runner=dask those of the scheduler; None: not under
    Beam. Raises InputError."""
    if dask_scheduler and runner != "dask":
        raise InputError("--dask_scheduler needs --runner=dask; add it or leave it out")
    if runner == "local":
        if text:
            raise InputError("--beam_options need --runner=beam; add it or leave them out")
        return None
    words = []
    if runner == "dask":
        require("distributed", "--runner=dask", "dask")
        if not re.fullmatch(r"(tcp|tls)://\S+:\d+", dask_scheduler or ""):
            raise InputError(
                f"--dask_scheduler={dask_scheduler or ''}: give the address that `dask scheduler` "
                "prints, such as tcp://HOST:8786"
            )
        words = dask_cluster.beam_arguments(dask_scheduler)
    try:
        return words + shlex.split(text)
    except ValueError as error:
        raise InputError(
            f"--beam_options={text}: {error}; quote them as on a command line"
        ) from None


# ---- directories -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Directories:
    """The directories of a preparation and the files that it works with."""

    input_dir: ArchiveDirectory | None  # None: a manifest names the scans
    output_dir: Path
    audit_dir: Path

    @property
    def records_dir(self) -> Path:  # staged volumes: as public as the dataset, and as large
        return self.output_dir / ".work"

    @property
    def work_dir(self) -> Path:  # private: its files name the scans
        return self.audit_dir / "work"

    @property
    def listing(self) -> Path:
        return self.work_dir / "listing"

    @property
    def notes_dir(self) -> Path:
        return self.work_dir / "notes"

    @property
    def kept_notes_dir(self) -> Path:
        return self.audit_dir / "notes"

    @property
    def staged_entries_dir(self) -> Path:  # of a manifest
        return self.audit_dir / "manifest"

    @property
    def frozen_file(self) -> Path:
        return self.work_dir / "frozen.json"

    @property
    def key_file(self) -> Path:
        return self.audit_dir / KEY_FILE

    def splits(self) -> dict[str, str]:
        """The split of each patient, from earlier runs; {} at first."""
        path = self.audit_dir / _SPLITS_FILE
        return read_json(path) if path.exists() else {}

    def write_splits(self, splits: Mapping[str, str]) -> None:
        """Writes the file that `splits` reads."""
        _write_private(self.audit_dir / _SPLITS_FILE, splits)

    def patients(self) -> dict[str, Any]:
        """Patients with several names, from earlier runs; {} if there are none."""
        path = self.audit_dir / _PATIENTS_FILE
        return read_json(path) if path.exists() else {}

    def write_patients(self, patients: Mapping[str, Any]) -> None:
        """Writes the file that `patients` reads."""
        if patients:
            _write_private(self.audit_dir / _PATIENTS_FILE, patients)

    def bound(self) -> dict[str, str]:
        """`digest` of the archive, `fingerprint` of the dataset, and its `output_dir` relative to
        the audit directory; all "" at first."""
        path = self.audit_dir / _BOUND_FILE
        stored = read_json(path) if path.exists() else {}
        return {"digest": "", "fingerprint": "", "output_dir": ""} | stored

    def bind(self, archive_digest: str, fingerprint: str) -> None:
        """Writes the file that `bound` reads, once the dataset is complete."""
        content = {
            "digest": archive_digest,
            "fingerprint": fingerprint,
            "output_dir": self._relative_output_dir(),
        }
        _write_private(self.audit_dir / _BOUND_FILE, content)

    def check(self) -> None:
        """Raises InputError for directories that contain one another, are missing or hold other
        files."""
        remote = isinstance(self.input_dir, RemoteArchive)
        if remote:
            self.input_dir.check("--input_dir")
        elif self.input_dir is None:
            pass
        elif self.input_dir.is_file():
            raise InputError(
                f"--input_dir={self.input_dir}: is a file; give the folder of the scans"
            )
        elif not self.input_dir.is_dir():
            raise InputError(
                f"--input_dir={self.input_dir}: no such directory; give the folder of the scans"
            )
        named = {"--output_dir": self.output_dir, "--audit_dir": self.audit_dir}
        named |= {"--input_dir": self.input_dir} if isinstance(self.input_dir, Path) else {}
        for (a, path_a), (b, path_b) in itertools.permutations(named.items(), 2):
            if path_a.resolve().is_relative_to(path_b.resolve()):
                raise InputError(
                    f"{a}={path_a} lies inside {b}={path_b}; choose a directory beside it"
                )
        for path in (self.output_dir, self.audit_dir):
            if path.exists() and not path.is_dir():
                raise InputError(f"{path}: is a file; choose another directory")
        ours = (PREPARATION_FILE, VOLUMES_FILE, self.records_dir.name)
        if self.output_dir.is_dir() and not any((self.output_dir / name).exists() for name in ours):
            if any(self.output_dir.iterdir()):
                raise InputError(
                    f"--output_dir={self.output_dir}: holds other files; choose a new directory"
                )

    def make(self) -> None:
        """Makes the output and the audit directory. Raises InputError."""
        for flag, directory, mode in (
            ("output", self.output_dir, 0o777),
            ("audit", self.audit_dir, 0o700),
        ):
            make_folder(directory, f"--{flag}_dir", mode)
        self.audit_dir.chmod(0o700)

    def refuse_audit_dir_of_another(self, dataset: Dataset | None) -> None:
        """Raises InputError unless the audit directory belongs to this dataset: the dataset has the
        place or the fingerprint that `bound` names."""
        bound = self.bound()
        if bound["output_dir"] in ("", self._relative_output_dir()):
            return
        if dataset and dataset.fingerprint == bound["fingerprint"]:
            return
        raise InputError(
            f"{self.audit_dir}: is the audit directory of another dataset, not of "
            f"{self.output_dir}; give another --audit_dir, and to share the pseudonyms "
            "--pseudonym_key_file with its key file"
        )

    def _relative_output_dir(self) -> str:
        return os.path.relpath(self.output_dir.resolve(), self.audit_dir.resolve())


def _write_private(path: Path, content: Mapping[str, Any]) -> None:
    write_file(path, (json.dumps(content, indent=1) + "\n").encode())


def with_absolute_paths(paths: Any) -> Any:
    """The same Directories or LabelSources for workers that may have another working directory."""

    def absolute(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(absolute(item) for item in value)
        return value.absolute() if isinstance(value, Path) else value

    fields = [field.name for field in dataclasses.fields(paths)]
    return dataclasses.replace(paths, **{name: absolute(getattr(paths, name)) for name in fields})


# ---- options of an earlier run -----------------------------------------------------------------


def refuse_other_options(
    stored: dict[str, Any], fingerprint: str, options: Options, key: bytes, output_dir: Path
) -> None:
    """Raises InputError unless a dataset was prepared with these options and this key.

    Args:
        stored: options that the dataset was prepared with, as `Options.as_dict` writes them.
        fingerprint: of the key that it was prepared with.
        options: of this run.
        key: of this run.
        output_dir: of the dataset.
    """
    current = options.as_dict()
    if stored.get("tables") != current["tables"]:
        names = [name for name, _ in stored.get("tables", []) + current["tables"]]
        raise InputError(
            f"{output_dir}: was prepared with other labels or attributes "
            f"({', '.join(dict.fromkeys(names))}); give the same files in the same order, or "
            "another --output_dir"
        )
    if stored.get("same_splits_as") and "same_splits_as" not in current:
        raise InputError(
            f"{output_dir}: was prepared with --same_splits_as; give it again, since new patients "
            "may have a split there"
        )
    for name in current:
        # the datasets of --same_splits_as may grow, too
        if name != "same_splits_as" and stored.get(name) != current[name]:
            raise InputError(
                f"{output_dir}: was prepared with {name}={_option_text(stored.get(name))}, not "
                f"{_option_text(current[name])}; give the same options or another --output_dir"
            )
    if fingerprint != key_fingerprint(key):
        raise InputError(
            f"{output_dir}: was prepared with another pseudonym key; give its --pseudonym_key_file "
            "or --audit_dir"
        )


def refuse_other_classes(
    stored: Mapping[str, Mapping[str, Any]], current: Mapping[str, Any], output_dir: Path
) -> None:
    """Raises InputError unless the labels of a dataset have the classes of the same tables now:
    programs with another version of the rules may take other cells for missing.

    Args:
        stored: `labels` of preparation.json.
        current: the same of this run.
        output_dir: of the dataset.
    """
    for name, facts in current.items():
        if stored.get(name) != facts:
            classes = [", ".join(of["classes"]) for of in (stored.get(name), facts) if of]
            raise InputError(
                f"{output_dir}: its label {name} has the classes {classes[0]}, and by this "
                f"program's rules {classes[-1]} (a word such as NaN is a missing cell); prepare "
                "all scans into a new --output_dir"
            )


def _option_text(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{name}:{_option_text(item)}" for name, item in value.items())
    if isinstance(value, list):
        if value and isinstance(value[0], list):
            return " ".join(_option_text(item) for item in value)
        return ",".join(f"{number:g}" for number in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
