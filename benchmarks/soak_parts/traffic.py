"""The kinds of operations, their frequencies, and their allowed endings."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import grpc
from img2img.v1 import asset_pb2, model_pb2
from img2img.v1 import image_to_image_pb2 as pb

from soak_parts.access import SMALL, Access
from soak_parts.calls import (
    PATIENCE,
    Connection,
    check_images,
    download,
    ending_of,
    follow,
    infer,
    unload,
    upload,
)
from soak_parts.faults import kill_a_client, proxy
from soak_parts.images import BAD_FIELDS, Subject, invalid_images
from soak_parts.ledger import Ledger, Violated

_BRIEF = 2.0
"""Maximum seconds until a caller gives up."""
_THINKING = 0.5
"""Pause in seconds of the small tenant between an answer and its next request."""
_PROMPTS = 200
"""Number of further prompts, so that caches overflow but the number of entries is bounded."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of operation: its share of the mix, and its allowed endings."""

    share: float
    endings: frozenset[str]
    fault: bool
    """Whether the caller or its connection misbehaves."""


def _kind(share: float, *endings: str, fault: bool = True) -> Kind:
    return Kind(share, frozenset(endings), fault)


KINDS = {
    "plain": _kind(30, "image", "refused", fault=False),
    "stream": _kind(14, "image", "refused", fault=False),
    "second model": _kind(5, "image", "refused", fault=False),
    "KServe": _kind(5, "image", "refused", fault=False),
    "asset": _kind(5, "image", "refused", fault=False),
    "slow reader": _kind(5, "image", "refused"),
    "cancel": _kind(14, "cancelled", "image", "refused"),
    "deadline": _kind(10, "deadline", "image", "refused"),
    "disconnect": _kind(8, "disconnected", "image", "refused"),
    "bad image": _kind(5, "invalid", "refused"),
    "bad field": _kind(4, "invalid", "refused"),
    # At fixed intervals instead of in the mix, because each costs a process or a model.
    "killed client": _kind(0, "killed"),
    "unload": _kind(0, "done"),
    # One after another, concurrent with the mix, by a separate tenant.
    "small tenant": _kind(0, "image", "refused", fault=False),
}


class Traffic:
    """Performs operations on one server, chosen by `dice`, and records them in `ledger`."""

    def __init__(
        self,
        port: int,
        access: Access,
        subjects: Sequence[Subject],
        models: tuple[str, str],
        kserve: bool,
        ledger: Ledger,
        dice: random.Random,
    ) -> None:
        self.ledger = ledger
        self.first, self.second = models
        self.small_seconds: list[float] = []
        """Latency of each answer to the small tenant."""
        self.references: dict[Subject, list[bytes]] = {}
        self._port = port
        self._target = f"127.0.0.1:{port}"
        self._subjects = subjects
        self._dice = dice
        self._access = access
        self._main = Connection(self._target, access)
        self._small = Connection(self._target, access, SMALL)
        self._mix = {name: kind.share for name, kind in KINDS.items() if kserve or name != "KServe"}
        self._operations: dict[str, Callable[[], Awaitable[str]]] = {
            "plain": self._plain,
            "stream": self._stream,
            "second model": self._second_model,
            "asset": self._asset,
            "slow reader": self._slow_reader,
            "cancel": self._cancel,
            "deadline": self._deadline,
            "disconnect": self._disconnect,
            "bad image": self._bad_image,
            "bad field": self._bad_field,
            "killed client": self._killed_client,
            "unload": self._unload,
            "KServe": self._kserve,
            "small tenant": self._small_tenant,
        }

    async def close(self) -> None:
        """Closes the connections that operations share."""
        await self._main.channel.close()
        await self._small.channel.close()

    async def upload(self) -> str:
        """Uploads an image and returns its id."""
        return await upload(self._main, self._subjects[0].source)

    async def small_tenant(self, going: Callable[[], bool]) -> None:
        """Sends requests of the small tenant one after another while `going` returns true."""
        while going():
            await self.perform("small tenant")
            await asyncio.sleep(_THINKING)

    async def small_alone(self, times: int) -> list[float]:
        """The latencies of `times` requests of the small tenant. No other caller may send requests meanwhile."""
        left = iter(range(times))
        await self.small_tenant(lambda: next(left, None) is not None)
        seconds, self.small_seconds = self.small_seconds, []
        return seconds

    async def make_references(self) -> None:
        """Makes each subject's images alone, as references for all later ones."""
        for subject in self._subjects:
            response = await self._main.images.Transform(subject.message(), timeout=PATIENCE)
            self.references[subject] = [image.data for image in response.images]
            check_images(await self._main.images.Transform(subject.message(), timeout=PATIENCE), self.references[subject])

    def draw(self) -> str:
        """A random kind, by the shares of the mix."""
        return self._dice.choices(list(self._mix), list(self._mix.values()))[0]

    async def perform(self, kind: str) -> str:
        """Performs one operation, records it in the ledger, and returns its ending."""
        number = self.ledger.begin(kind)
        try:
            ending = await self._operations[kind]()
        except grpc.aio.AioRpcError as error:
            try:
                ending = ending_of(error)
            except Violated as broken:
                self.ledger.violate(f"{kind}: {broken}")
                ending = "wrong"
        except (Violated, OSError) as broken:
            self.ledger.violate(f"{kind}: {broken}")
            ending = "wrong"
        if ending not in KINDS[kind].endings | {"wrong"}:
            self.ledger.violate(f"{kind} ended as {ending}")
        self.ledger.end(number, ending)
        return ending

    def _subject(self) -> Subject:
        return self._dice.choice(self._subjects)

    def _stranger(self) -> pb.TransformRequest:
        """A request whose images are not checked: a subject with another prompt."""
        return self._subject().message(prompt=f"another landscape, number {self._dice.randrange(_PROMPTS)}")

    async def _plain(self) -> str:
        subject = self._subject()
        response = await self._main.images.Transform(subject.message(), timeout=PATIENCE)
        check_images(response, self.references[subject])
        return "image"

    async def _stream(self) -> str:
        subject = self._subject()
        request = subject.message(preview_interval=self._dice.choice((0, 0, 3)))
        call = self._main.images.TransformStream(pb.TransformStreamRequest(request=request), timeout=PATIENCE)
        check_images(await follow(call), self.references[subject])
        return "image"

    async def _second_model(self) -> str:
        subject = self._subject()
        reference = pb.ModelReference(path=self.second)
        response = await self._main.images.Transform(subject.message(model=reference), timeout=PATIENCE)
        check_images(response, self.references[subject])
        return "image"

    async def _asset(self) -> str:
        """Uploads a source, transforms it into an asset and downloads that; every second time also deletes another asset."""
        subject, keep = self._subject(), self._dice.random() < 0.5
        source = await upload(self._main, subject.source)
        image_source = self._dice.choice((pb.ImageSource(asset_id=source), pb.ImageSource(uri=f"asset:{source}")))
        request = subject.message(image=image_source, output=pb.OutputOptions(as_asset=True))
        response = await self._main.images.Transform(request, timeout=PATIENCE)
        pause = self._dice.choice((0.0, 0.2))
        for image in response.images:
            image.data = await download(self._main, image.asset_id, pause)
        check_images(response, self.references[subject])
        if not keep:
            # A separate asset, because others may use the first: the same content is the same asset.
            await self._delete_one()
        return "image"

    async def _delete_one(self) -> None:
        data = self._dice.randbytes(8).hex()
        unique = self._subject().source + data.encode()  # bytes after the end of a PNG are ignored
        source = await upload(self._main, unique)
        await self._main.assets.DeleteAsset(asset_pb2.DeleteAssetRequest(id=source), timeout=PATIENCE)
        try:
            await download(self._main, source)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            return
        raise Violated("a deleted asset can be downloaded")

    async def _slow_reader(self) -> str:
        subject = self._subject()
        request = pb.TransformStreamRequest(request=subject.message(preview_interval=1))
        async with Connection(self._target, self._access, slow=True) as connection:
            call = connection.images.TransformStream(request, timeout=PATIENCE)
            check_images(await follow(call, pause=self._dice.uniform(0.05, 0.5)), self.references[subject])
        return "image"

    async def _cancel(self) -> str:
        stream, wait = self._dice.random() < 0.5, self._dice.uniform(0, _BRIEF)
        if stream:
            call = self._main.images.TransformStream(pb.TransformStreamRequest(request=self._stranger()), timeout=PATIENCE)
            task = asyncio.ensure_future(follow(call))
        else:
            task = asyncio.ensure_future(_answered(self._main.images.Transform(self._stranger(), timeout=PATIENCE)))
        done, _ = await asyncio.wait([task], timeout=wait)
        if done:
            task.result()
            return "image"
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            return "cancelled"
        return "image"

    async def _deadline(self) -> str:
        await self._main.images.Transform(self._stranger(), timeout=self._dice.uniform(0.02, _BRIEF))
        return "image"

    async def _disconnect(self) -> str:
        async with proxy(self._port) as broken, Connection(broken.target, self._access) as connection:
            call = connection.images.TransformStream(pb.TransformStreamRequest(request=self._stranger()), timeout=PATIENCE)
            heard = asyncio.Event()
            task = asyncio.ensure_future(follow(call, started=heard))
            listening = asyncio.ensure_future(heard.wait())
            await asyncio.wait([task, listening], return_when=asyncio.FIRST_COMPLETED)
            listening.cancel()
            await asyncio.wait([task], timeout=self._dice.uniform(0, _BRIEF))
            broken.sever()
            await task
        return "image"

    async def _bad_image(self) -> str:
        name, data = self._dice.choice(list(invalid_images(self._dice).items()))
        await self._main.images.Transform(self._subject().message(image=pb.ImageSource(data=data)), timeout=PATIENCE)
        raise Violated(f"the server accepted an invalid image ({name})")

    async def _bad_field(self) -> str:
        field, change = self._dice.choice(BAD_FIELDS)
        await self._main.images.Transform(self._subject().message(**change), timeout=PATIENCE)
        raise Violated(f"the server accepted an invalid {field}")

    async def _killed_client(self) -> str:
        await kill_a_client(self._target, self._access, self._stranger().SerializeToString(), self._dice.uniform(0, _BRIEF))
        return "killed"

    async def _kserve(self) -> str:
        subject = self._subject()
        check_images(await infer(self._main, self.first, subject.message()), self.references[subject])
        return "image"

    async def _small_tenant(self) -> str:
        subject, begun = self._subjects[0], time.monotonic()
        response = await self._small.images.Transform(subject.message(), timeout=PATIENCE)
        self.small_seconds.append(time.monotonic() - begun)
        check_images(response, self.references[subject])
        return "image"

    async def _unload(self) -> str:
        await unload(self._main, self.second)
        model = await self._main.models.GetModel(model_pb2.GetModelRequest(id=self.second), timeout=PATIENCE)
        if model.model.state == model_pb2.MODEL_STATE_FAILED:
            raise Violated(f"the unloaded model has failed: {model.model.detail}")
        return "done"


async def _answered(call: Awaitable[pb.TransformResponse]) -> pb.TransformResponse:
    return await call
