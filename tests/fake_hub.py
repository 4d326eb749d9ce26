"""A stand-in on this machine for a model hub: it answers what huggingface_hub asks for."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A hub with one repository.

    It requires `token` if set: for the repository or, if that is `gated`, for its files only. It closes the connection, `cuts`
    times, after `cut` bytes of a file that is longer. `sent` are the bytes of each file that went out.
    """

    files: dict[str, bytes]
    url: str = ""
    repo: str = "someone/model"
    fetched: list[str] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False
    status: int = 401
    cut: int = 0
    cuts: int = 0
    ranges: list[str] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    """Answers what huggingface_hub asks: about the repository, for its list of files, about a file, and for a file."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer(send=False)

    def do_GET(self) -> None:
        self.answer(send=True)

    def answer(self, send: bool) -> None:
        path, hub = self.path.partition("?")[0], self.hub
        about, files = path.startswith(f"/api/models/{hub.repo}"), f"/{hub.repo}/resolve/"
        known = hub.token is None or self.headers["Authorization"] == f"Bearer {hub.token}"
        if not known and not (about and hub.gated):
            self.refuse(hub.status, "GatedRepo" if hub.gated else "RepoNotFound")
        elif about and "/tree/" in path:
            entries = [{"type": "file", "path": name, "size": len(body), "oid": digest(body)} for name, body in hub.files.items()]
            self.reply("", json.dumps(entries).encode(), send)
        elif about:
            siblings = [{"rfilename": name, "size": len(body), "blobId": digest(body)} for name, body in hub.files.items()]
            self.reply("", json.dumps({"id": hub.repo, "sha": COMMIT, "siblings": siblings}).encode(), send)
        elif path.startswith(files) and (name := path.removeprefix(files).partition("/")[2]) in hub.files:
            hub.fetched += [name] if send else []
            self.reply(name, hub.files[name], send)
        else:
            self.refuse(404, "RepoNotFound")

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def reply(self, name: str, body: bytes, send: bool) -> None:
        start, end = self.wanted(len(body))
        part = body[start:end]
        self.send_response(200 if part == body else 206)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(part)))
        if part != body:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(body)}")
        self.send_header("ETag", f'"{digest(body)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if send and name and self.hub.cuts and self.hub.cut < end:
            part, self.hub.cuts, self.close_connection = body[start : self.hub.cut], self.hub.cuts - 1, True
        if send:
            self.hub.sent[name] = self.hub.sent.get(name, 0) + len(part)
            self.wfile.write(part)

    def wanted(self, size: int) -> tuple[int, int]:
        """The beginning and end of the requested range."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return 0, size
        self.hub.ranges.append(asked[0])
        return int(asked[1]), min(int(asked[2]) + 1, size) if asked[2] else size

    def log_message(self, *_: object) -> None:
        pass


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serves `hub` at its `url`, on a free port."""

    class BoundHandler(Handler):
        pass

    BoundHandler.hub = hub
    with ThreadingHTTPServer(("127.0.0.1", 0), BoundHandler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
