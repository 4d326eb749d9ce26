"""A process of hostile clients that attack a server until standard input ends. `strangers.py` starts it.

    python -m soak_parts.attacks < settings.json-line, then lines of "pause" and "resume"

It prints "ready" when each client has begun, "paused" when no client sends, and at the end the statuses of the answers to the
attacks, as JSON.
"""

import asyncio
import base64
import contextlib
import gzip
import itertools
import json
import random
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from img2img.v1 import image_to_image_pb2 as pb

from soak_parts import hostile, image_bombs
from soak_parts.access import STRANGER, Access
from soak_parts.faults import proxy
from soak_parts.images import noise, png
from soak_parts.raw_http2 import END_STREAM, GOAWAY, HEADERS, RESET, RawConnection

SECONDS = 60.0
"""The deadline of a call of an attack; beyond it the call counts as unanswered."""
MARKERS: tuple[Callable[[], bytes], ...] = (
    lambda: image_bombs.jpeg_segments(0xE9, 200_000),
    lambda: image_bombs.jpeg_segments(0xFE, 200_000),
    lambda: image_bombs.gif_comments(200_000),
    lambda: image_bombs.png_chunks(b"abCd", 50_000),
    lambda: image_bombs.webp_chunks(50_000),
    lambda: image_bombs.tiff_strips(50_000),
)
_PAUSE = 0.25
_HELD = (5.0, 20.0)
"""Seconds after which clients that do not read reconnect."""
_RESETS = 50
_CANCEL = (8).to_bytes(4, "big")
_KSERVE = "/inference.GRPCInferenceService/ModelInfer"
_PATTERNS = bytes([pb.ModelReference.ALLOW_PATTERNS_FIELD_NUMBER << 3 | 2, 0])
_Attack = Callable[[], Iterator[str]]


def held_calls(kserve: bool) -> Counter[str]:
    """Maximum calls of each method that these clients have open while paused."""
    calls = [method for method, _ in hostile.crowd_calls(pb.TransformRequest(), "asset", kserve)]
    return Counter(2 * [*calls, *[hostile.UPLOAD] * 3, hostile.UNARY])


def nested(field: int, body: bytes) -> bytes:
    """An encoded message field with `body` as its message."""
    length, size = len(body), bytearray()
    while length >= 128:
        size.append(length & 127 | 128)
        length >>= 7
    return bytes([field << 3 | 2, *size, length]) + body


class Gate:
    """Admits attacks unless it is closed. Closing waits until running attacks have ended."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._closed = False
        self._within = 0

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Waits while the gate is closed. Within the block it cannot be closed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._within += 1
        try:
            yield
        finally:
            with self._changed:
                self._within -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Returns when no attack is running."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._within)

    def open(self) -> None:
        """Admits waiting attacks."""
        with self._changed:
            self._closed = False
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class Settings:
    """`port` accepts HTTP/2 without TLS (the server's port, or a tunnel to it); `target` is the server's address."""

    port: int
    target: str
    access: Access
    asset: str
    kserve: bool
    seed: int

    @property
    def token(self) -> str:
        """The token; empty without tokens."""
        return self.access.secrets.get(STRANGER, "")


class Strangers:
    """All hostile clients, each in a thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._gate = Gate()
        self._lock = threading.Lock()
        self._statuses: dict[str, Counter[str]] = defaultdict(Counter)
        self._channel = settings.access.blocking_channel(settings.target, STRANGER)
        self._begun: list[threading.Event] = []
        source = png(noise((64, 64), settings.seed))
        self._request = pb.TransformRequest(prompt="x", image=pb.ImageSource(data=source), num_inference_steps=4)
        scans = [self._transform(image_bombs.jpeg_scans(count)) for count in (100, 2_000, 20_000)]
        markers = [self._transform(make()) for make in MARKERS]
        patterns = nested(pb.TransformRequest.MODEL_FIELD_NUMBER, _PATTERNS * 1_000_000)
        packed = [(hostile.UNARY, patterns)]
        if settings.kserve:  # an input's shape, whose elements are packed
            packed.append((_KSERVE, nested(5, nested(3, b"\x01" * 1_000_000))))
        self._attacks: dict[str, _Attack] = {
            "JPEG scan bombs": lambda: self._calls([(hostile.UNARY, body) for body in scans]),
            "marker bombs": lambda: self._calls([(hostile.UNARY, body) for body in markers]),
            "packed fields": lambda: self._calls(packed),
            "gzip messages": self._compressed(gzip.compress(patterns * 16)),
            "stream resets": self._resets,
        }

    def begin(self) -> None:
        """Starts all clients and returns when each has connected."""
        for name, attack in self._attacks.items():
            self._start(lambda begun, name=name, attack=attack: self._repeat(name, attack, begun))  # type: ignore[misc]
        dice = random.Random(self._settings.seed)
        for seconds in (None, dice.uniform(*_HELD)):
            self._start(lambda begun, seconds=seconds: self._hold(seconds, begun))  # type: ignore[misc]
        for begun in self._begun:
            begun.wait()

    def obey(self, lines: Iterator[str]) -> None:
        """Pauses and resumes as `lines` say, until they end."""
        for line in lines:
            if line.strip() == "pause":
                self._gate.close()
                print("paused", flush=True)
            else:
                self._gate.open()

    def statuses(self) -> dict[str, dict[str, int]]:
        """The statuses of the answers so far, by kind of attack."""
        with self._lock:
            return {name: dict(found) for name, found in self._statuses.items()}

    def _start(self, run: Callable[[threading.Event], None]) -> None:
        begun = threading.Event()
        self._begun.append(begun)
        threading.Thread(target=run, args=(begun,), daemon=True).start()

    def _count(self, name: str, status: str) -> None:
        with self._lock:
            self._statuses[name][status] += 1

    def _repeat(self, name: str, attack: _Attack, begun: threading.Event) -> None:
        pause = threading.Event()
        for status in itertools.chain.from_iterable(attack() for _ in itertools.count()):
            self._count(name, status)
            begun.set()
            pause.wait(_PAUSE)

    def _hold(self, seconds: float | None, begun: threading.Event) -> None:
        """Clients that do not read and uploads that stall, for `seconds` or until the server closes the connection."""
        settings = self._settings
        while True:
            try:
                with contextlib.ExitStack() as stack:
                    with self._gate.passing():
                        crowd = hostile.crowd(settings.port, self._request, settings.asset, settings.kserve, settings.token)
                        reader = stack.enter_context(crowd)
                    self._count("unread answers and stalled uploads", "connected")
                    begun.set()
                    reader.closed.wait(seconds)
            except OSError:
                threading.Event().wait(_PAUSE)

    def _transform(self, image: bytes) -> bytes:
        return pb.TransformRequest(prompt="x", image=pb.ImageSource(data=image)).SerializeToString()

    def _calls(self, calls: Sequence[tuple[str, bytes]]) -> Iterator[str]:
        for method, body in calls:
            with self._gate.passing():
                yield self._answer(method, body)

    def _answer(self, method: str, body: bytes) -> str:
        call: Any = self._channel.unary_unary(method)
        try:
            call(body, timeout=SECONDS)
        except grpc.RpcError as error:
            return str(error.code().name)
        return "OK"

    def _compressed(self, message: bytes) -> _Attack:
        def attack() -> Iterator[str]:
            with self._gate.passing():
                try:
                    with RawConnection(self._settings.port) as connection:
                        connection.call(hostile.UNARY, message, token=self._settings.token, encoding="gzip")
                        yield _ending(connection)
                except OSError:
                    yield "closed"

        return attack

    def _resets(self) -> Iterator[str]:
        """Calls that are reset immediately, some with and some without their message."""
        body = self._request.SerializeToString()
        with self._gate.passing():
            try:
                with RawConnection(self._settings.port) as connection:
                    for stream in range(1, 2 * _RESETS, 2):
                        messages = (body,) if stream % 4 == 1 and stream < 4 else ()
                        connection.call(hostile.UNARY, *messages, stream=stream, token=self._settings.token)
                        connection.send(RESET, _CANCEL, stream=stream)
                yield "sent"
            except OSError:
                yield "closed"


def _ending(connection: RawConnection) -> str:
    """The ending of a call on stream 1: the server resets it, closes the connection, or sends trailers."""
    for frame in connection.frames():
        if frame.kind == RESET or frame.kind == GOAWAY:
            return "reset"
        if frame.kind == HEADERS and frame.flags & END_STREAM:
            return "refused"
    return "closed"


@contextlib.contextmanager
def _tunnel(target: str, access: Access) -> Iterator[int]:
    """A port that forwards to the server without TLS."""
    port = int(target.rpartition(":")[2])
    if not access.authority:
        yield port
        return
    loop, opened = asyncio.new_event_loop(), contextlib.AsyncExitStack()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    tunnel = asyncio.run_coroutine_threadsafe(opened.enter_async_context(proxy(port, access.context())), loop).result(SECONDS)
    yield int(tunnel.target.rpartition(":")[2])


def main() -> int:
    """Attacks until standard input ends."""
    given = json.loads(sys.stdin.readline())
    access = Access(base64.b64decode(given["authority"]), given["secrets"])
    with _tunnel(given["target"], access) as port:
        strangers = Strangers(Settings(port, given["target"], access, given["asset"], given["kserve"], given["seed"]))
        strangers.begin()
        print("ready", flush=True)
        strangers.obey(iter(sys.stdin.readline, ""))
    print(json.dumps(strangers.statuses()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
