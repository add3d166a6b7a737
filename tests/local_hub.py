"""A model hub on loopback: the few answers that downloads need, from folders."""

from __future__ import annotations

import hashlib
import http.server
import json
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """The few calls that downloads make. Models lie at one commit, named ``main`` and ``v1``."""

    def __init__(self, models: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.models, self.asked = models, list[str]()


class Answer(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        names = path.removeprefix("/api/models").strip("/").split("/")
        folder = self.server.models.get("/".join(names[:2]))
        if folder is None or (len(names) > 3 and names[3] not in ("main", "v1", COMMIT)):
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound" if folder is None else "RevisionNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        files = {str(f.relative_to(folder)): f for f in sorted(folder.rglob("*")) if f.is_file()}
        if path.startswith("/api/models"):
            if "tree" in names:
                tree = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": oid(f)} for n, f in files.items()]
                self.answer(json.dumps(tree).encode(), "application/json")
            else:
                told = {"id": "/".join(names[:2]), "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
                self.answer(json.dumps(told).encode(), "application/json")
            return
        file = files["/".join(names[4:])]
        if self.command == "GET":
            self.server.asked.append("/".join(names[4:]))
        self.answer(file.read_bytes(), "application/octet-stream", {"X-Repo-Commit": COMMIT, "ETag": f'"{oid(file)}"'})

    def answer(self, body: bytes, kind: str, more: dict[str, str] | None = None) -> None:
        self.send_response(200)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(more or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
