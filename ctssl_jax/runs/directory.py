"""Where a run directory is: on a mounted file system, or `gs://BUCKET/DIR`.

All of `runs` and its callers take the path object that `run_directory` makes. Only this module
knows how a place is typed. On `gs://` Orbax writes the checkpoints by its own driver, and the small
files are objects, which appear whole or not at all. A bucket has no folders to rename: a checkpoint
there is complete as long as it has the object that Orbax writes last.
"""

import importlib.util
import os
import shutil
from pathlib import Path
from typing import cast

import fsspec
from etils import epath

from data_prep.system import stores
from data_prep.system.errors import InputError
from data_prep.system.extras import pip_install

_COMMIT = "commit_success.txt"  # Orbax writes it last
_REMOVED = ".removed"  # ending of a checkpoint that is being removed


def run_directory(text: str | os.PathLike, name: str = "--workdir") -> Path:
    """The place of a run directory, which need not exist.

    Args:
      text: as the user typed it, or a path object of this function.
      name: the flag or field that names it, for messages.

    Returns:
      A `pathlib.Path`, `~` and `file://` resolved. For `gs://` an `etils.epath.Path`, which has the
      same methods and none of the operating system's (no descriptor, no rename of folders).

    Raises:
      InputError: a URL of another kind, or a bucket that cannot be reached.
    """
    text = os.fspath(text)
    if text.startswith(("gcs://", "s3://", "s3a://")):
        scheme, _, rest = text.partition("://")
        remedy = f"write gs://{rest}" if scheme == "gcs" else "copy it from or to a local folder"
        raise InputError(f"{name}={text}: no run directory can be on {scheme}://; {remedy}")
    if not text.startswith("gs://"):
        return stores.local_path(text, name, "give a folder, or gs://BUCKET/DIR")
    bucket, _, folder = text.removeprefix("gs://").partition("/")
    if not bucket or not folder.strip("/"):
        raise InputError(f"{name}={text}: give a folder of a bucket, gs://BUCKET/DIR")
    if not (_is_installed("gcsfs") and _is_installed("google.cloud.storage")):
        raise InputError(
            f"{name}={text}: needs packages that are not installed: {pip_install('gcs')}"
        )
    # A kept listing would hide the objects that TensorStore writes.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    store, _ = stores.open_store(f"gs://{bucket}")
    try:
        if not store.exists(bucket):
            raise FileNotFoundError
    except Exception as error:  # the package has many kinds
        raise InputError(f"{name}={text}: {stores.explain(text, error)}") from None
    return cast(Path, epath.Path(text.rstrip("/")))


def absolute(path: Path) -> Path:
    """The path as Orbax wants it."""
    return path.resolve() if isinstance(path, Path) else path


# ---- the folder of the checkpoints ---------------------------------------------------------------


def complete_checkpoints(folder: Path) -> list[Path]:
    """The folders of all complete checkpoints, readable or not."""
    if isinstance(folder, Path):
        found = list(folder.iterdir()) if folder.is_dir() else []
    else:
        found = [path.parent for path in folder.glob(f"*/{_COMMIT}")]
    return [path for path in found if path.name.isdigit()]


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, which is complete no more from the first moment."""
    if isinstance(path, Path):
        removed = path.with_name(f"{path.name}{_REMOVED}")
        path.replace(removed)
        shutil.rmtree(removed, ignore_errors=True)  # what stays is removed the next time
    else:
        (path / _COMMIT).unlink()
        path.rmtree()


def remove_incomplete(folder: Path) -> None:
    """Remove what a kill left of checkpoints that were being removed and, on `gs://`, written. No
    save may be under way."""
    if isinstance(folder, Path):
        for path in folder.glob(f"*{_REMOVED}"):
            shutil.rmtree(path, ignore_errors=True)
    elif folder.is_dir():
        for path in folder.iterdir():
            if path.name.isdigit() and not (path / _COMMIT).exists():
                path.rmtree()


def move_checkpoint(path: Path, target: Path) -> None:
    """Give a checkpoint another place; on `gs://` the store copies it."""
    if isinstance(path, Path):
        os.replace(path, target)
    else:
        store, _ = stores.open_store(str(path))
        store.copy(f"{path}/", f"{target}/", recursive=True)
        remove_checkpoint(path)


def object_checksums(folder: Path, *, depth: int | None = None) -> dict[str, str]:
    """The checksums of the objects below a folder of `gs://`, by their names in it, as the store
    lists them: nothing is read."""
    store, path = stores.open_store(str(folder))
    return {
        name[len(path) + 1 :]: _object_checksum(facts)
        for name, facts in store.find(path, maxdepth=depth, detail=True).items()
    }


def _object_checksum(facts: dict) -> str:
    """Objects that were uploaded in parts have no MD5.

    CRC32C is the second choice: files that end with their own CRC32C all have the same one.
    """
    if facts.get("md5Hash"):
        return f"md5={facts['md5Hash']}"
    return f"crc32c={facts.get('crc32c', '')}"


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package that holds it
        return False
