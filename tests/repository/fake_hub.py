"""A Hugging Face hub on the loopback interface: one repository, its files, and nothing else."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REPOSITORY = "someone/tiny-model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _handler(files: dict[str, bytes]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def _answer(self, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            name = path.removeprefix(f"/{REPOSITORY}/resolve/").partition("/")[2]
            if path.startswith(f"/api/models/{REPOSITORY}/tree/"):
                self._send(json.dumps([_entry(name, data) for name, data in files.items()]).encode(), with_body)
            elif path.startswith(f"/api/models/{REPOSITORY}"):
                siblings = [{"rfilename": name} for name in files]
                self._send(json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}).encode(), with_body)
            elif path.startswith(f"/{REPOSITORY}/resolve/") and name in files:
                self._send(files[name], with_body, {"ETag": f'"{_oid(files[name])}"'})
            else:
                self._send(b'{"error": "Repository not found"}', with_body, {"X-Error-Code": "RepoNotFound"}, 404)

        def _send(self, body: bytes, with_body: bool, headers: dict[str, str] | None = None, status: int = 200) -> None:
            self.send_response(status)
            named = {"Content-Type": "application/json", "Content-Length": str(len(body)), "X-Repo-Commit": COMMIT}
            for name, value in (named | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    return Handler


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}


@contextmanager
def fake_hub(files: dict[str, bytes]) -> Iterator[str]:
    """Its address, while the context lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(files))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
