"""Envoy with deploy/envoy/envoy.yaml in front of a server, and gRPC-Web calls as a browser makes them."""

import base64
import contextlib
import http.client
import re
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import trustme
from conftest import REPOSITORY
from google.protobuf.message import Message
from google.rpc import status_pb2
from other_clients import PATIENCE

CONFIG = REPOSITORY / "deploy" / "envoy" / "envoy.yaml"
ORIGIN = "http://localhost:3000"
"""The page's origin in that file."""
SERVICE = "/img2img.v1.ImageToImageService/"


def with_options(text: str) -> str:
    """The configuration with all its options (lines that begin with "#" and no space)."""
    return re.sub(r"^( *)#(?=\S)", r"\1", text, flags=re.MULTILINE)


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def proxied(upstream: int, folder: Path, options: bool = False, origin: str = ORIGIN) -> Iterator[int]:
    """Runs Envoy in `folder` with the repository's configuration, in front of the server on port `upstream`, for
    pages of `origin`. Yields its port."""
    with socket.socket() as reserved:
        # Envoy listens with the same option: the port cannot go to another process in between.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        port: int = reserved.getsockname()[1]
        text = CONFIG.read_text(encoding="utf-8")
        for default, used in ((8080, port), (50051, upstream)):
            assert text.count(f"port_value: {default}}}") == 1
            text = text.replace(f"port_value: {default}}}", f"port_value: {used}}}")
        assert text.count(f"exact: {ORIGIN} ") == 1
        text = text.replace(f"exact: {ORIGIN} ", f"exact: {origin} ")
        (folder / "envoy.yaml").write_text(with_options(text) if options else text)
        program = str(Path(sys.executable).parent / "envoy")
        command = [program, "--config-path", "envoy.yaml", "--concurrency", "1", "--disable-hot-restart"]
        with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stderr is not None
                log = []
                for line in process.stderr:
                    log.append(line)
                    if "starting workers" in line:
                        break
                else:
                    raise AssertionError("".join(log))
                threading.Thread(target=process.stderr.read, daemon=True).start()
                # The workers, which that line announces, listen a moment later.
                while not accepts(port):
                    assert process.poll() is None
                yield port
            finally:
                process.kill()


def framed(message: Message) -> bytes:
    data = message.SerializeToString()
    return b"\0" + len(data).to_bytes(4, "big") + data


class WebCall:
    """One gRPC-Web call over HTTP/1.1. Iterating yields messages as they arrive; afterwards `trailers` are set."""

    def __init__(
        self,
        port: int,
        method: str,
        body: bytes,
        headers: Mapping[str, str] | None = None,
        tls: ssl.SSLContext | None = None,
        text: bool = False,
    ) -> None:
        kind = "application/grpc-web-text" if text else "application/grpc-web+proto"
        sent = {"Content-Type": kind, "Accept": kind, "X-Grpc-Web": "1", "Origin": ORIGIN, **(headers or {})}
        if tls is None:
            self._connection = http.client.HTTPConnection("localhost", port, timeout=PATIENCE)
        else:
            self._connection = http.client.HTTPSConnection("localhost", port, timeout=PATIENCE, context=tls)
        # The response to a request that is refused while it is being sent is read despite the reset, as browsers do.
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            self._connection.request("POST", method, base64.b64encode(body) if text else body, sent)
        self._response = self._connection.getresponse()
        self._text = text
        self._pending = b""
        self.http_status = self._response.status
        self.headers = {name.lower(): value for name, value in self._response.getheaders()}
        self.trailers: dict[str, str] = {name: value for name, value in self.headers.items() if name.startswith("grpc-")}

    def _read(self, size: int) -> bytes:
        while self._text and len(self._pending) < size:
            quantum = self._response.read(4)
            if not quantum:
                break
            self._pending += base64.b64decode(quantum)
        if not self._text:
            return self._response.read(size)
        found, self._pending = self._pending[:size], self._pending[size:]
        return found

    def __iter__(self) -> Iterator[bytes]:
        while head := self._read(5):
            data = self._read(int.from_bytes(head[1:], "big"))
            if head[0] & 0x80:
                lines = (line.split(":", 1) for line in data.decode().splitlines())
                self.trailers.update({name.lower(): value.strip() for name, value in lines})
            else:
                yield data
        self.close()

    def close(self) -> None:
        """Closes the connection, as a browser does when the page is left."""
        self._response.close()
        self._connection.close()

    @property
    def status(self) -> int:
        return int(self.trailers["grpc-status"])

    @property
    def details(self) -> Any:
        """The google.rpc.Status of a call that failed."""
        encoded = self.trailers["grpc-status-details-bin"]
        return status_pb2.Status.FromString(base64.b64decode(encoded + "=" * (-len(encoded) % 4)))


def certify(folder: Path) -> ssl.SSLContext:
    """Writes the files that the options name, and the server's certificate. Returns what a client trusts."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for name in ("server", "proxy"):
        issued = authority.issue_cert("localhost")
        (folder / f"{name}.pem").write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(folder / f"{name}.key")
        (folder / f"{name}.key").chmod(0o600)
    return ssl.create_default_context(cafile=str(folder / "ca.pem"))
