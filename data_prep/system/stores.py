"""Object stores by URL (`gs://BUCKET/DIR`, `s3://BUCKET/DIR`), through fsspec and its packages for
each store.

One rule holds for every place that a user names. `SCHEME://...` is a URL, never a local folder of
that name. `file://` names a local path. A misspelt URL (`gs:/x`, `GS://x`, `hf-hub:x`) is refused;
a local folder of such a name is given as `./gs:/x`.

The packages bring credentials, endpoints and retries: gcsfs uses the login of
`gcloud auth application-default login`, s3fs uses `aws configure` or the variables `AWS_*`. The
configuration files and variables of fsspec hold for both.
"""

import dataclasses
import errno
import functools
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec

from data_prep.system.errors import InputError
from data_prep.system.extras import pip_install

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+(::[A-Za-z0-9+.-]+)*):(?P<slashes>/*)")
_LOCAL = ("file", "local")
# These are recognised without a slash, too. Other names may hold a colon.
_SCHEMES = (
    *("abfs", "az", "file", "ftp", "gcs", "gs", "hdfs", "hf", "hf-hub", "http", "https", "s3"),
    *("s3a", "sftp", "ssh"),
)
# protocol -> extra of this package's installation
_EXTRAS = {
    **{"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"},
    **dict.fromkeys(("http", "https"), "http"),
}
_LOGGERS = ("fsspec", "gcsfs", "s3fs", "aiobotocore", "botocore", "google.auth", "urllib3")
_CREDENTIALS = {"gcs": "gcloud auth application-default login", "s3": "aws configure"}


class StoreReadError(OSError):
    """The store failed, after the retries of its package. `strerror` names no file."""


def is_url(text: str | os.PathLike) -> bool:
    """Whether a place is named by a URL of a store. `file://` names a local path.

    Raises:
        InputError: a misspelt URL.
    """
    return _scheme(text) not in ("", *_LOCAL)


def _scheme(text: str | os.PathLike) -> str:
    """The scheme of a URL, "" for a path. Raises InputError for a misspelt URL."""
    text = os.fspath(text)
    found = _URL.match(text)
    if not found:
        return ""
    scheme, slashes = found["scheme"], found["slashes"]
    if not slashes and scheme.lower() not in _SCHEMES:
        return ""
    slash = "/" if scheme.lower() in _LOCAL else ""
    meant = f"{scheme.lower()}://{slash}{text[found.end() :]}"
    if meant.startswith("hf-hub:"):
        raise InputError(f"{text}: models of a hub are not read; download the file and give it")
    if scheme != scheme.lower() or len(slashes) < 2:
        raise InputError(f"{text}: is not a URL; write {meant}, or ./{text} for a local path")
    if scheme in _LOCAL and not text.startswith((f"{scheme}:///", f"{scheme}://~/")):
        path = text[found.end() :]
        raise InputError(f"{text}: names no absolute path; write {meant}, or {path}")
    return scheme


def without_slash(url: str) -> str:
    return url if url.endswith("://") else url.rstrip("/")


def local_path(text: str | os.PathLike, name: str = "", remedy: str = "give a local copy") -> Path:
    """The path that `text` names, `~` and `file://` resolved.

    Raises:
        InputError: it is the URL of a store, or a misspelt one; the message begins with `name`, a
            flag.
    """
    text = os.fspath(text)
    named = f"{name}={text}" if name else text
    try:
        scheme = _scheme(text)
    except InputError as error:
        raise InputError(f"{name}={error}" if name else str(error)) from None
    if scheme and scheme not in _LOCAL:
        raise InputError(f"{named}: must be on a mounted file system; {remedy}")
    path = Path(text.removeprefix(f"{scheme}://") if scheme else text).expanduser()
    # pathlib makes `gs:/x` of `./gs:/x`, which a second call would refuse
    return path.absolute() if _URL.match(str(path)) else path


@dataclasses.dataclass(frozen=True)
class Access:
    """How stores are reached where not by the settings of their packages."""

    anonymous: bool = True  # without credentials
    endpoint_url: str = ""  # of a server that is not the provider's own
    timeout_s: float = 60.0  # without a byte

    def options(self, scheme: str) -> dict[str, Any]:
        """For the class of fsspec that opens this kind of store."""
        endpoint = {"endpoint_url": self.endpoint_url} if self.endpoint_url else {}
        seconds = self.timeout_s
        if scheme in ("s3", "s3a"):
            limits = {"connect_timeout": seconds, "read_timeout": seconds}
            limits["retries"] = {"max_attempts": 1}  # s3fs has tries of its own
            return {"anon": self.anonymous, "config_kwargs": limits, **endpoint}
        if scheme in ("gs", "gcs"):
            login = {"token": "anon"} if self.anonymous else {}
            return {"requests_timeout": seconds, **login, **endpoint}
        if scheme in ("http", "https"):
            import aiohttp

            # without `total`: a large file may take its time
            limit = aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
            return {"client_kwargs": {"timeout": limit}}
        return {}


def open_store(url: str, access: Access | None = None) -> tuple["AbstractFileSystem", str]:
    """The file system of a URL and the path in it, without a slash at its end.

    Raises:
        InputError: a package or credentials are missing, or the protocol is unknown.
    """
    return _open_store(url, access, os.getpid())


@functools.lru_cache(maxsize=32)
def _open_store(url: str, access: Access | None, process: int) -> tuple["AbstractFileSystem", str]:
    """One connection for all threads of a process; a forked process opens its own."""
    # Their logs quote file names and print tracebacks of errors that are raised, too.
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        # A cached listing of millions of files would fill the memory.
        options = access.options(_scheme(url)) if access else {}
        store, path = fsspec.url_to_fs(url, use_listings_cache=False, **options)
    except ImportError as error:
        extra = _extra(url)
        remedy = pip_install(extra) if extra else f"install it ({error})"
        raise InputError(f"{url}: needs a package that is not installed: {remedy}") from None
    except ValueError as error:
        raise InputError(
            f"{url}: {error}; give a directory, or a URL such as gs://BUCKET/DIR"
        ) from None
    except Exception as error:  # each package has its own
        raise InputError(f"{url}: {explain(url, error)}") from None
    return store, path.rstrip("/")


def explain(url: str, error: Exception) -> str:
    """A line on the failure of a store and the remedy, for errors that concern all of `url`."""
    if isinstance(error, FileNotFoundError):
        return "no such bucket or folder; check the name"
    said = " ".join(str(error).split())[:200]
    login = _CREDENTIALS.get(_extra(url))
    remedy = "check the name, the network and the credentials" + (f" ({login})" if login else "")
    return f"the store refuses or cannot be reached ({type(error).__name__}: {said}); {remedy}"


def failed(error: BaseException) -> str:
    """A line on an error that a store's package raised outside of this module; "" for others."""
    package = type(error).__module__.partition(".")[0]
    if package not in ("aiohttp", "botocore", "fsspec", "gcsfs", "google", "requests", "s3fs"):
        return ""
    return explain("gs://" if package in ("gcsfs", "google") else "", error)


def read_error(error: Exception) -> StoreReadError:
    """The failure of a read as the operating system would report it, with an errno and without
    names."""
    for kind, number in ((FileNotFoundError, errno.ENOENT), (PermissionError, errno.EACCES)):
        if isinstance(error, kind):
            return StoreReadError(number, os.strerror(number))
    return StoreReadError(errno.EIO, f"the store failed: {type(error).__name__}")


def store_failure(error: BaseException | None) -> StoreReadError | None:
    """The failed read that caused an error, or None. zipfile reports a file that could not be read
    as "not a zip file"."""
    while error is not None and not isinstance(error, StoreReadError):
        error = error.__cause__ or error.__context__
    return error


def _extra(url: str) -> str:
    protocols = url.split("://")[0].split("::")
    return next((_EXTRAS[name] for name in protocols if name in _EXTRAS), "")
