"""A minimal HTTP/2 client, for frames that gRPC's clients never send."""

import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
ACK, END_STREAM, END_HEADERS = 1, 1, 4
MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_HEADER_LIST_SIZE = 3, 4, 6
ENHANCE_YOUR_CALM = 11
MAX_FRAME = 16384
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Frame:
    """An HTTP/2 frame."""

    kind: int
    flags: int
    stream: int
    payload: bytes

    @property
    def bytes(self) -> bytes:
        """The encoded frame."""
        return (
            len(self.payload).to_bytes(3, "big") + bytes([self.kind, self.flags]) + self.stream.to_bytes(4, "big") + self.payload
        )


class RawConnection:
    """A connection to a gRPC server on this machine, after the preface and settings. `window` is the flow-control window of
    each stream for data from the server, in bytes (default: HTTP/2's). `timeout` is that of a socket operation, in seconds."""

    def __init__(self, port: int, window: int | None = None, timeout: float | None = 30) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=timeout)
        self._buffer = b""
        try:
            self._socket.sendall(_PREFACE)
            self.send(SETTINGS, b"" if window is None else struct.pack(">HI", INITIAL_WINDOW_SIZE, window))
        except OSError:
            self.close()
            raise

    def send(self, kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> None:
        """Sends one frame."""
        self._socket.sendall(Frame(kind, flags, stream, payload).bytes)

    def call(self, method: str, *messages: bytes, stream: int = 1, token: str = "", end: bool = True, encoding: str = "") -> None:
        """Begins a call and sends `messages`, at most 65535 bytes in all; without any the call stays open. With an `encoding`,
        such as gzip, the messages must be compressed already and are marked so."""
        headers = {":method": "POST", ":scheme": "http", ":path": method, ":authority": "x", "te": "trailers",
                   "content-type": "application/grpc"} | ({"authorization": f"Bearer {token}"} if token else {})  # fmt: skip
        headers |= {"grpc-encoding": encoding} if encoding else {}
        literal = b"".join(b"\x00" + _string(name) + _string(value) for name, value in headers.items())
        self.send(HEADERS, literal, END_HEADERS, stream)
        for number, message in enumerate(messages, start=1):
            last = end and number == len(messages)
            data = bytes([bool(encoding)]) + len(message).to_bytes(4, "big") + message
            blocks = [data[start : start + MAX_FRAME] for start in range(0, len(data), MAX_FRAME)]
            for block in blocks[:-1]:
                self.send(DATA, block, stream=stream)
            self.send(DATA, blocks[-1], END_STREAM if last else 0, stream)

    def frames(self) -> Iterator[Frame]:
        """Yields the frames from the server until it closes the connection. Acknowledges none."""
        while True:
            while len(self._buffer) >= 9 and len(self._buffer) >= 9 + (size := int.from_bytes(self._buffer[:3], "big")):
                kind, flags, stream = struct.unpack(">BBI", self._buffer[3:9])
                payload, self._buffer = self._buffer[9 : 9 + size], self._buffer[9 + size :]
                yield Frame(kind, flags, stream, payload)
            try:
                data = self._socket.recv(65536)
            except ConnectionError:
                return
            if not data:
                return
            self._buffer += data

    def close(self) -> None:
        """Closes the connection."""
        self._socket.close()

    def __enter__(self) -> "RawConnection":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def settings_of(frame: Frame) -> dict[int, int]:
    """The values of a SETTINGS frame, by the number of each setting."""
    return dict(struct.iter_unpack(">HI", frame.payload))


def _string(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()
