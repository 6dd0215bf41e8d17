"""Exported models by name: a folder, a zip file of it, or a hub's repository as a run directory.

The weights are imported once, into the cache of this user, and the run directory there is used from
then on.
"""

import os
import re
import shutil
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

from ctssl_jax.release.importing import WEIGHTS, import_weights
from ctssl_jax.runs.reports import say
from ctssl_jax.torch_bridge.manifests import read_manifest
from data_prep.system.errors import InputError
from data_prep.system.extras import require
from data_prep.system.files import file_sha256
from data_prep.system.stores import local_path

HUB = "hf-hub:"
# Of a repository only data is fetched: no code and no pickle.
_MANIFEST = "manifest.json"
_OF_A_REPOSITORY = (_MANIFEST, "model.safetensors")
MANIFEST_BYTES = 16 << 20


def as_run(name: str | os.PathLike, flag: str = "--workdir") -> str | os.PathLike:
    """The run directory of an exported model; any other name as it is.

    Args:
      name: a run directory; a folder of `ctssl_jax.export`, or a zip file of it;
        `hf-hub:ORG/NAME` or `hf-hub:ORG/NAME@REVISION`.
      flag: the flag or field with which the user named it, for messages.

    Raises:
      InputError: a repository that cannot be fetched, a damaged folder or zip file, or weights that
        are not those of the manifest.
    """
    text = os.fspath(name)
    if text.startswith(HUB):
        return _imported(_fetched(text, flag), text, flag)
    if "://" in text:
        return name
    path = local_path(text, flag)
    if path.suffix == ".zip" and path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            return _imported(_unpacked(path, Path(folder), flag), text, flag)
    return _imported(path, text, flag) if (path / _MANIFEST).is_file() else name


def fetched_file(name: str | os.PathLike, file: str, flag: str) -> bytes | None:
    """One file of an exported model, as its manifest describes it; None where it has none.

    Args:
      name: as for `as_run`, but for run directories.
      file: its name.
      flag: for messages.

    Raises:
      InputError: the model cannot be fetched or read, or the file was changed.
    """
    text = os.fspath(name)
    if text.startswith(HUB):
        folder = _fetched(text, flag, file)
    else:
        folder = local_path(text, flag)
    with tempfile.TemporaryDirectory() as unpacked:
        if folder.suffix == ".zip" and folder.is_file():
            folder = _unpacked(folder, Path(unpacked), flag, (file,))
        if not (folder / _MANIFEST).is_file():
            raise InputError(
                f"{flag}={name} has no {_MANIFEST}; give a folder or zip file of ctssl_jax.export, "
                "or hf-hub:ORG/NAME"
            )
        described = _manifest_of(folder, text, flag)["files"].get(file)
        if described is None:
            return None
        path = folder / file
        if not path.is_file() or file_sha256(path) != described.get("sha256"):
            raise InputError(
                f"{flag}={name}: {file} is missing or not what was exported; fetch it again"
            )
        return path.read_bytes()


def _fetched(name: str, flag: str, *more: str) -> Path:
    """The local copy of a repository: manifest and weights, or manifest and these files."""
    require("huggingface_hub", f"{flag}={name}", "hub")
    import huggingface_hub

    repository, _, revision = name.removeprefix(HUB).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise InputError(
            f"{flag}={name} is not a name of a hub; give {HUB}ORG/NAME or {HUB}ORG/NAME@REVISION"
        )
    try:
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=[_MANIFEST, *more] if more else list(_OF_A_REPOSITORY),
        )
    except Exception as error:  # of many kinds: no such repository or revision, no network
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(
            f"{flag}={name} cannot be fetched ({type(error).__name__}: {reason}); check the name, "
            "the revision, the network and, for a private repository, your token"
        ) from None
    if not (Path(folder) / _MANIFEST).is_file():
        raise InputError(
            f"{flag}={name} is not a model of ctssl_jax.export (no {_MANIFEST} in it); give "
            "another repository"
        )
    return Path(folder)


def _unpacked(path: Path, folder: Path, flag: str, wanted: tuple[str, ...] = ()) -> Path:
    """Manifest of a zip file, in a folder, and these files, by default its weights if they are not
    imported yet."""
    try:
        with zipfile.ZipFile(path) as archive:
            tops = [
                name.removesuffix(_MANIFEST)
                for name in archive.namelist()
                if name.rpartition("/")[2] == _MANIFEST and name.count("/") < 2
            ]
            if not tops:
                raise InputError(
                    f"{flag}={path} has no {_MANIFEST}; give a zip file of a folder of "
                    "ctssl_jax.export"
                )
            top = min(tops, key=len)
            _unpack(archive, top, _MANIFEST, folder, MANIFEST_BYTES)
            files = _manifest_of(folder, str(path), flag)["files"]
            if not wanted and not _cached(folder).is_dir():
                wanted = WEIGHTS
            for name in wanted:
                if name in files and top + name in archive.namelist():
                    _unpack(archive, top, name, folder, files[name].get("bytes", 0))
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise InputError(f"{flag}={path} is a damaged zip file ({error}); copy it again") from None
    return folder


def _manifest_of(folder: Path, name: str, flag: str) -> dict[str, Any]:
    """The manifest of a folder, which the user knows by this name."""
    path = folder / _MANIFEST
    try:
        manifest = read_manifest(path, f"{flag}={name}")
    except InputError as error:
        raise InputError(str(error).replace(f": {path}", f": {_MANIFEST}")) from None
    if not all(isinstance(facts, dict) for facts in manifest["files"].values()):
        raise InputError(f"{flag}={name}: {_MANIFEST} is damaged; copy the whole folder again")
    return manifest


def _unpack(archive: zipfile.ZipFile, top: str, name: str, folder: Path, limit: int) -> None:
    """One member, unless it is larger than it may be."""
    if archive.getinfo(top + name).file_size <= limit:
        with archive.open(top + name) as source, open(folder / name, "wb") as target:
            shutil.copyfileobj(source, target)


def _imported(folder: Path, name: str, flag: str) -> Path:
    """The cached run directory of an exported folder."""
    _manifest_of(folder, name, flag)
    run = _cached(folder)
    if run.is_dir():
        return run
    unfinished = run.with_name(f".{run.name}.{os.getpid()}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        import_weights(folder, unfinished, None, [])
        unfinished.rename(run)
    except InputError as error:
        raise InputError(str(error).replace(f"--checkpoint={folder}", f"{flag}={name}")) from None
    except OSError as error:
        if not run.is_dir():  # else another process was faster
            raise InputError(
                f"{flag}={name}: the imported weights cannot be written to {run.parent} "
                f"({error.strerror}); set CTSSL_CACHE to another folder"
            ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    say(f"imported     {name}")
    return run


def _cached(folder: Path) -> Path:
    """Where the run of an exported folder is cached: in `imported` of `$CTSSL_CACHE`, by default of
    the folder `ctssl_jax` of the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    cache = Path(os.environ.get("CTSSL_CACHE") or f"{home}/ctssl_jax").expanduser()
    return cache / "imported" / file_sha256(folder / _MANIFEST)[:16]
