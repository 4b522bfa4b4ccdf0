"""A hub on loopback that answers what Hugging Face's client asks for: commits, lists of files, the files."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "0123"


@dataclass
class FakeHub:
    """Repositories by `(type, name)`; all have the one commit `COMMIT`, which `main` stands for."""

    url: str = ""
    repos: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def add(self, name: str, folder: Path, kind: str = "models") -> None:
        self.repos[kind, name] = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def serve() -> Iterator[FakeHub]:
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            parts = path.strip("/").split("/")
            if parts[0] == "api":
                kind, name = parts[1], "/".join(parts[2:4])
                files = hub.repos.get((kind, name))
                if files is None:
                    return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
                if parts[4] == "revision" and parts[5] not in {"main", COMMIT}:
                    return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
                if parts[4] == "revision":
                    siblings = [{"rfilename": file, **entry(file, content)} for file, content in files.items()]
                    return self.json({"id": name, "sha": COMMIT, "siblings": siblings}, body)
                return self.json([entry(file, content) for file, content in files.items()], body)
            kind = "datasets" if parts[0] == "datasets" else "models"
            parts = parts[1:] if kind == "datasets" else parts
            name, file = "/".join(parts[:2]), "/".join(parts[4:])
            content = hub.repos.get((kind, name), {}).get(file)
            if content is None:
                return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, body)
            facts = entry(file, content)
            tag = facts["lfs"]["oid"] if "lfs" in facts else facts["oid"]
            return self.send(200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}, body)

        def json(self, document, body: bool) -> None:
            self.send(200, json.dumps(document).encode(), {"Content-Type": "application/json"}, body)

        def send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def entry(file: str, content: bytes) -> dict:
    """As the hub lists a file: large ones (here: safetensors) by SHA-256, others by git's hash."""
    git = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    facts = {"type": "file", "path": file, "size": len(content), "oid": git}
    if file.endswith((".safetensors", ".bin")):
        facts["lfs"] = {"oid": sha256(content), "sha256": sha256(content), "size": len(content), "pointerSize": 134}
    return facts
