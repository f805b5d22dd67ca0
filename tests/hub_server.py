"""A server that speaks as much of the Hugging Face hub's protocol as pushing and loading a delta takes."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"


class Hub(ThreadingHTTPServer):
    """Repositories in memory: name → revision → file → content. Private ones are hidden without the token."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()

    @property
    def address(self) -> str:
        """What HF_ENDPOINT is to say."""
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def hub() -> Iterator[Hub]:
    """A server for as long as the body runs."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _sha(files: dict[str, bytes]) -> str:
    """A commit's name: 40 hexadecimal digits, by content."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        parts = [unquote(p) for p in urlsplit(self.path).path.strip("/").split("/")]
        if parts[1] == "validate-yaml":
            return self._json({"warnings": [], "errors": []})
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self._refuse(401, "Invalid username or password.")
        if parts[:3] == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        revisions = self.server.repos["/".join(parts[2:4])]
        revision = parts[5]
        if parts[4] == "branch":
            revisions.setdefault(revision, dict(revisions.get("main", {})))
            return self._json({})
        if parts[4] == "preupload":
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for f in json.loads(body)["files"]]  # fmt: skip
            return self._json({"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                revisions.setdefault(revision, {})[line["value"]["path"]] = content
        oid = _sha(revisions[revision])
        return self._json({"commitOid": oid, "commitUrl": f"{self.server.address}/x/y/commit/{oid}"})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'user'}/{asked['name'].rpartition('/')[2]}"
        self.server.repos.setdefault(name, {"main": {}})
        if asked.get("private") or asked.get("visibility") == "private":
            self.server.private.add(name)
        self._json({"url": f"{self.server.address}/{name}", "name": name, "id": name})

    def do_GET(self) -> None:
        parts = [unquote(p) for p in urlsplit(self.path).path.strip("/").split("/")]
        api = parts[0] == "api"
        name = "/".join(parts[2:4] if api else parts[:2])
        hidden = name in self.server.private and self.headers.get("authorization") != f"Bearer {TOKEN}"
        if name not in self.server.repos or hidden:
            return self._refuse(404, "Repository not found", "RepoNotFound")
        revision = (parts[5] if len(parts) > 5 else "main") if api else parts[3]
        files = self._files(name, revision)
        if files is None:
            return self._refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if api and parts[4:5] == ["tree"]:
            tree = [
                {"type": "file", "path": path, "size": len(content), "oid": _sha({path: content})}
                for path, content in files.items()
            ]
            return self._json(tree)
        if api:
            siblings = [{"rfilename": path} for path in files]
            return self._json(
                {"id": name, "sha": _sha(files), "siblings": siblings, "private": False, "tags": []}
            )
        return self._file(files, "/".join(parts[4:]))

    do_HEAD = do_GET

    def _files(self, name: str, revision: str) -> dict[str, bytes] | None:
        for branch, files in self.server.repos[name].items():
            if revision in (branch, _sha(files)):
                return files
        return None

    def _file(self, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            return self._refuse(404, "Entry not found", "EntryNotFound")
        etag = hashlib.sha256(files[path]).hexdigest()
        self._answer(200, files[path], {"ETag": f'"{etag}"', "X-Repo-Commit": _sha(files)})

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, code: int, text: str, kind: str = "") -> None:
        self._answer(
            code, json.dumps({"error": text}).encode(), {"X-Error-Code": kind, "X-Error-Message": text}
        )

    def _answer(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
