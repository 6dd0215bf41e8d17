"""A bucket of Google Cloud Storage on this machine: `gs://bucket`, of gcp-storage-emulator.

The emulator ignores preconditions on generations. Here they are added for `ifGenerationMatch`.

    python -m tests.helpers.bucket PORT    # until it is killed
"""

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

BUCKET = "bucket"


def environment(port: int) -> dict[str, str]:
    """Variables by which gcsfs, TensorStore and Google's package find the bucket.

    gcsfs of 2026 asks by gRPC for the kind of a bucket, and waits a minute where nobody answers.
    """
    url = f"http://127.0.0.1:{port}"
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "GOOGLE_CLOUD_PROJECT": "test",
    }


def make_server(port: int = 0) -> Any:
    """A server with an empty bucket in memory, which is not started."""
    from gcp_storage_emulator.handlers import objects

    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    if not hasattr(objects.insert, "checked"):
        # before the server's routes are made
        objects.insert, objects.delete = map(_checked, (objects.insert, objects.delete))
    from gcp_storage_emulator import server

    return server.create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)


def _checked(handler: Callable[..., None]) -> Callable[..., None]:
    def handle(request: Any, response: Any, storage: Any, *args: Any, **kwargs: Any) -> None:
        wanted = request.query.get("ifGenerationMatch")
        if wanted and "upload_id" not in request.query:
            name = request.params.get("object_id") or request.query.get("name", [""])[0]
            if not name:
                data = request.data
                name = (data.get("meta") or data).get("name")
            found = "0"
            with contextlib.suppress(Exception):  # there is none
                found = storage.get_file_obj(request.params["bucket_name"], name)["generation"]
            if found != wanted[0]:
                response.status = HTTPStatus.PRECONDITION_FAILED
                response.json({"error": {"code": 412, "message": "conditionNotMet"}})
                return
        handler(request, response, storage, *args, **kwargs)

    handle.checked = True
    return handle


@contextlib.contextmanager
def serving() -> Iterator[int]:
    """The bucket, served by a thread of this process; yields the port."""
    server = make_server()
    server.start()
    while server._api._httpd is None:  # its own event comes before
        threading.Event().wait(0.01)
    try:
        yield server._api._httpd.server_address[1]
    finally:
        server.stop()


if __name__ == "__main__":
    make_server(int(sys.argv[1])).run()
    os._exit(0)
