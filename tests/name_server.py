"""A DNS server on this machine with one name, like a headless service of Kubernetes (the needed subset of RFC 1035)."""

import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

A, TXT = 1, 16


class NameServer:
    """Returns `addresses` for a query of addresses, and `text` for one of the service config. `asked` are the queried types of
    record."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self.addresses = list(addresses)
        self.text: str | None = None
        self.asked: list[int] = []
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.authority = f"127.0.0.1:{self.socket.getsockname()[1]}"

    def serve(self) -> None:
        while True:
            query, caller = self.socket.recvfrom(2048)
            if not query:
                return
            self.socket.sendto(self._answer(query), caller)

    def _answer(self, query: bytes) -> bytes:
        end = query.index(0, 12) + 5
        (kind,) = struct.unpack("!H", query[end - 4 : end - 2])
        self.asked.append(kind)
        found: list[bytes] = []
        if kind == A:
            found = [socket.inet_aton(address) for address in self.addresses]
        elif kind == TXT and self.text is not None:
            text = f"grpc_config={self.text}".encode()
            found = [b"".join(bytes([len(text[at : at + 255])]) + text[at : at + 255] for at in range(0, len(text), 255))]
        head = query[:2] + struct.pack("!HHHHH", 0x8580, 1, len(found), 0, 0)
        records = (b"\xc0\x0c" + struct.pack("!HHIH", kind, 1, 1, len(data)) + data for data in found)
        return head + query[12:end] + b"".join(records)


@contextmanager
def name_server(*addresses: str) -> Iterator[NameServer]:
    """Runs one until the block is left."""
    server = NameServer(addresses)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", server.socket.getsockname())
        thread.join(120)
        server.socket.close()
