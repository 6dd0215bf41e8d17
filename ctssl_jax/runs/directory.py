"""Where a run directory is: on a mounted file system, or `gs://BUCKET/DIR`.

All of `runs` and its callers take the path object that `run_directory` makes. Only this module
knows how a place is typed. On `gs://` Orbax writes the checkpoints by its own driver, and the small
files are objects, which appear whole or not at all.
"""

import importlib.util
import os
from pathlib import Path
from typing import cast

from data_prep.system import stores
from data_prep.system.errors import InputError


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
        return stores.local_path(text, name, "or on gs://BUCKET/DIR")
    bucket, _, folder = text.removeprefix("gs://").partition("/")
    if not bucket or not folder.strip("/"):
        raise InputError(f"{name}={text}: give a folder of a bucket, gs://BUCKET/DIR")
    if not (_is_installed("gcsfs") and _is_installed("google.cloud.storage")):
        raise InputError(
            f"{name}={text}: needs packages that are not installed: pip install 'ctssl_jax[gcs]'"
        )
    import fsspec
    from etils import epath

    # A kept listing would hide the objects that TensorStore writes.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    store, _ = stores.open_store(f"gs://{bucket}")
    try:
        if not store.exists(bucket):
            raise FileNotFoundError
    except Exception as error:  # the package has many kinds
        raise InputError(f"{name}={text}: {stores.explain(text, error)}") from None
    return cast(Path, epath.Path(text.rstrip("/")))


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package that holds it
        return False
