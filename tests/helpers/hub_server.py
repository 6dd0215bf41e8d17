"""A model hub on this machine: as much of its interface as `huggingface_hub` needs to make a
repository, upload files in one commit, and download a revision."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """Repositories by name: revisions by name, each the commit and its files.

    Attributes:
      url: where it listens.
      repositories: name -> revision -> file -> bytes.
      requests: method and path of every request.
    """

    def __init__(self, url: str):
        self.url = url
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.requests: list[str] = []

    def commit(self, repository: str, files: dict[str, bytes]) -> str:
        """Add files to `main`; returns the commit, a revision, too."""
        revisions = self.repositories.setdefault(repository, {"main": {}})
        whole = revisions["main"] | files
        name = hashlib.sha1(json.dumps(sorted(map(repr, whole.items()))).encode()).hexdigest()
        revisions["main"] = revisions[name] = whole
        return name

    def commit_of(self, repository: str, revision: str) -> str:
        files = self.repositories[repository][revision]
        return next(
            name
            for name, content in self.repositories[repository].items()
            if content == files and name != "main"
        )


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    """A hub until the end of the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    def _answer(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, content: Any, status: int = 200, **headers: str) -> None:
        text = json.dumps(content).encode()
        self._answer(text, status, Content_Type="application/json", **headers)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"POST {path}")
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.hub.repositories.setdefault(name, {"main": {}})
            self._json({"url": f"{self.hub.url}/{name}", "private": asked.get("private")})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "preupload" in parts:
            files = json.loads(body)["files"]
            regular = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self._json({"files": [{"path": file["path"], **regular} for file in files]})
        elif "commit" in parts:
            lines = [json.loads(line) for line in body.splitlines()]
            sent = [line["value"] for line in lines if line["key"] == "file"]
            files = {file["path"]: base64.b64decode(file["content"]) for file in sent}
            commit = self.hub.commit("/".join(parts[2:4]), files)
            url = f"{self.hub.url}/{'/'.join(parts[2:4])}/commit/{commit}"
            self._json({"commitUrl": url, "commitOid": commit, "success": True})
        else:
            self._json({"error": "not here"}, 404)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        api, *rest = path.strip("/").split("/")
        if api == "api":
            self._describe("/".join(rest[1:3]), rest[3:])
        else:
            self._file(f"{api}/{rest[0]}", rest[2], "/".join(rest[3:]))

    do_HEAD = do_GET

    def _describe(self, repository: str, rest: list[str]) -> None:
        revision = rest[1] if len(rest) > 1 else "main"
        if repository not in self.hub.repositories:
            self._json({"error": "no repository"}, 404, X_Error_Code="RepoNotFound")
        elif revision not in self.hub.repositories[repository]:
            self._json({"error": "no revision"}, 404, X_Error_Code="RevisionNotFound")
        elif rest and rest[0] == "tree":
            files = self.hub.repositories[repository][revision]
            self._json(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
                    for name, content in files.items()
                ]
            )
        else:
            commit = self.hub.commit_of(repository, revision)
            files = self.hub.repositories[repository][revision]
            self._json(
                {
                    "id": repository,
                    "modelId": repository,
                    "sha": commit,
                    "siblings": [{"rfilename": name} for name in files],
                    "tags": [],
                    "private": True,
                    "downloads": 0,
                    "likes": 0,
                }
            )

    def _file(self, repository: str, revision: str, name: str) -> None:
        files = self.hub.repositories.get(repository, {}).get(revision, {})
        if name not in files:
            self._json({"error": "no file"}, 404, X_Error_Code="EntryNotFound")
            return
        content = files[name]
        commit = self.hub.commit_of(repository, revision)
        self._answer(content, ETag=f'"{_etag(content)}"', X_Repo_Commit=commit)


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
