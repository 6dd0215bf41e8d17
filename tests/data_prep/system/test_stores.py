"""How places are named: paths, `file://`, URLs of stores, and misspelt ones."""

from pathlib import Path

import pytest

from data_prep.system import stores
from data_prep.system.errors import InputError


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("scans", "scans"),
        ("/a/b:c", "/a/b:c"),
        ("file:///a/b", "/a/b"),
        ("local:///a", "/a"),
        ("~/a", "/nowhere/a"),
        ("file://~/a", "/nowhere/a"),
        ("C:/a", "C:/a"),
    ],
)
def test_local_paths(text, path, monkeypatch):
    monkeypatch.setenv("HOME", "/nowhere")
    assert not stores.is_url(text)
    assert stores.local_path(text, "--output") == Path(path)


@pytest.mark.parametrize("text", ["run:3", "./gs:/x"])
def test_a_local_name_with_a_colon_stays_local_when_it_is_read_again(text):
    path = stores.local_path(text)
    assert path == Path.cwd() / text
    assert stores.local_path(path) == path


@pytest.mark.parametrize(
    "text",
    ["gs://b/c", "gcs://b/c", "s3://b/c", "http://h/c", "simplecache::gs://b", "no-such://c"],
)
def test_urls_are_no_local_paths(text):
    assert stores.is_url(text)
    with pytest.raises(InputError, match="must be on a mounted file system; choose a folder here"):
        stores.local_path(text, "--output", "choose a folder here")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gs:/b/c", "is not a URL; write gs://b/c, or ./gs:/b/c for a local path"),
        ("gs:b", "is not a URL; write gs://b, or"),
        ("GS://b", "is not a URL; write gs://b, or"),
        ("Http://h", "is not a URL; write http://h, or"),
        ("no-such:/c", "is not a URL; write no-such://c, or"),
        ("file:/a/b", "is not a URL; write file:///a/b, or"),
        ("file://a/b", "names no absolute path; write file:///a/b, or a/b"),
        ("hf-hub:timm/x", "download the file and give it"),
    ],
)
def test_misspelt_urls_are_refused(text, words):
    with pytest.raises(InputError) as refused:
        stores.is_url(text)
    assert words in str(refused.value)
    with pytest.raises(InputError) as refused:
        stores.local_path(text, "--output")
    assert str(refused.value).startswith(f"--output={text}: ") and words in str(refused.value)


def test_failures_of_stores_are_told_from_bugs():
    error = type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})("503 no\nanswer")
    assert stores.failed(error).startswith("the store refuses or cannot be reached (HttpError: 503")
    assert stores.failed(ValueError("no")) == ""
