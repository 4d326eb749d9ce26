"""The mix: every kind of operation, how often it comes, and how it may end."""

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
    check_pictures,
    download,
    ending_of,
    follow,
    infer,
    unload,
    upload,
)
from soak_parts.faults import kill_a_client, proxy
from soak_parts.ledger import Ledger, Violated
from soak_parts.pictures import BAD_FIELDS, Subject, bad_pictures

_BRIEF = 2.0
"""Seconds within which a caller that gives up does so."""
_THINKING = 0.5
"""Seconds between an answer to the small tenant and its next request."""
_PROMPTS = 200
"""Different prompts that come beside the subjects' own, so that caches overflow and still come to an end."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of operation: its share of the mix, and the endings that are as they should be."""

    share: float
    endings: frozenset[str]
    fault: bool
    """Whether a caller, or its connection, misbehaves."""


def _kind(share: float, *endings: str, fault: bool = True) -> Kind:
    return Kind(share, frozenset(endings), fault)


KINDS = {
    "plain": _kind(30, "picture", "refused", fault=False),
    "stream": _kind(14, "picture", "refused", fault=False),
    "second model": _kind(5, "picture", "refused", fault=False),
    "KServe": _kind(5, "picture", "refused", fault=False),
    "asset": _kind(5, "picture", "refused", fault=False),
    "slow reader": _kind(5, "picture", "refused"),
    "cancel": _kind(14, "cancelled", "picture", "refused"),
    "deadline": _kind(10, "deadline", "picture", "refused"),
    "disconnect": _kind(8, "disconnected", "picture", "refused"),
    "bad picture": _kind(5, "invalid", "refused"),
    "bad field": _kind(4, "invalid", "refused"),
    # Not drawn from the mix, as each costs a process or a model: on a clock of their own.
    "killed client": _kind(0, "killed"),
    "unload": _kind(0, "done"),
    # One after another, beside the mix, by a tenant of its own.
    "small tenant": _kind(0, "picture", "refused", fault=False),
}


class Traffic:
    """Performs operations on one server, drawn by `dice`, and keeps `ledger`."""

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
        """How long each answer took that the small tenant got."""
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
            "bad picture": self._bad_picture,
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
        """Requests of a tenant that waits for each answer before it asks again, for as long as `going` says so."""
        while going():
            await self.perform("small tenant")
            await asyncio.sleep(_THINKING)

    async def small_alone(self, times: int) -> list[float]:
        """The seconds of each of so many requests of the small tenant: nobody else may call meanwhile."""
        left = iter(range(times))
        await self.small_tenant(lambda: next(left, None) is not None)
        seconds, self.small_seconds = self.small_seconds, []
        return seconds

    async def draw_references(self) -> None:
        """Draws each subject's images alone: what every later one is held to."""
        for subject in self._subjects:
            response = await self._main.images.Transform(subject.message(), timeout=PATIENCE)
            self.references[subject] = [image.data for image in response.images]
            check_pictures(await self._main.images.Transform(subject.message(), timeout=PATIENCE), self.references[subject])

    def draw(self) -> str:
        """A kind, by the shares of the mix."""
        return self._dice.choices(list(self._mix), list(self._mix.values()))[0]

    async def perform(self, kind: str) -> str:
        """One operation, noted in the ledger. Returns how it ended."""
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
        """A request whose image is not checked: a subject with another prompt."""
        return self._subject().message(prompt=f"a passer-by, number {self._dice.randrange(_PROMPTS)}")

    async def _plain(self) -> str:
        subject = self._subject()
        response = await self._main.images.Transform(subject.message(), timeout=PATIENCE)
        check_pictures(response, self.references[subject])
        return "picture"

    async def _stream(self) -> str:
        subject = self._subject()
        request = subject.message(preview_interval=self._dice.choice((0, 0, 3)))
        call = self._main.images.TransformStream(pb.TransformStreamRequest(request=request), timeout=PATIENCE)
        check_pictures(await follow(call), self.references[subject])
        return "picture"

    async def _second_model(self) -> str:
        subject = self._subject()
        reference = pb.ModelReference(path=self.second)
        response = await self._main.images.Transform(subject.message(model=reference), timeout=PATIENCE)
        check_pictures(response, self.references[subject])
        return "picture"

    async def _asset(self) -> str:
        """Uploads a source, has it transformed into an asset and downloads that; every other time deletes another one."""
        subject, keep = self._subject(), self._dice.random() < 0.5
        source = await upload(self._main, subject.source)
        picture = self._dice.choice((pb.ImageSource(asset_id=source), pb.ImageSource(uri=f"asset:{source}")))
        request = subject.message(image=picture, output=pb.OutputOptions(as_asset=True))
        response = await self._main.images.Transform(request, timeout=PATIENCE)
        pause = self._dice.choice((0.0, 0.2))
        for image in response.images:
            image.data = await download(self._main, image.asset_id, pause)
        check_pictures(response, self.references[subject])
        if not keep:
            # Not what others may be using: the same content is the same asset.
            await self._delete_one()
        return "picture"

    async def _delete_one(self) -> None:
        data = self._dice.randbytes(8).hex()
        unique = self._subject().source + data.encode()  # bytes after a PNG's end are not looked at
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
            check_pictures(await follow(call, pause=self._dice.uniform(0.05, 0.5)), self.references[subject])
        return "picture"

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
            return "picture"
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            return "cancelled"
        return "picture"

    async def _deadline(self) -> str:
        await self._main.images.Transform(self._stranger(), timeout=self._dice.uniform(0.02, _BRIEF))
        return "picture"

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
        return "picture"

    async def _bad_picture(self) -> str:
        name, data = self._dice.choice(list(bad_pictures(self._dice).items()))
        await self._main.images.Transform(self._subject().message(image=pb.ImageSource(data=data)), timeout=PATIENCE)
        raise Violated(f"a picture was made of one that is {name}")

    async def _bad_field(self) -> str:
        field, change = self._dice.choice(BAD_FIELDS)
        await self._main.images.Transform(self._subject().message(**change), timeout=PATIENCE)
        raise Violated(f"a picture was made with a wrong {field}")

    async def _killed_client(self) -> str:
        await kill_a_client(self._target, self._access, self._stranger().SerializeToString(), self._dice.uniform(0, _BRIEF))
        return "killed"

    async def _kserve(self) -> str:
        subject = self._subject()
        check_pictures(await infer(self._main, self.first, subject.message()), self.references[subject])
        return "picture"

    async def _small_tenant(self) -> str:
        subject, begun = self._subjects[0], time.monotonic()
        response = await self._small.images.Transform(subject.message(), timeout=PATIENCE)
        self.small_seconds.append(time.monotonic() - begun)
        check_pictures(response, self.references[subject])
        return "picture"

    async def _unload(self) -> str:
        await unload(self._main, self.second)
        model = await self._main.models.GetModel(model_pb2.GetModelRequest(id=self.second), timeout=PATIENCE)
        if model.model.state == model_pb2.MODEL_STATE_FAILED:
            raise Violated(f"the unloaded model has failed: {model.model.detail}")
        return "done"


async def _answered(call: Awaitable[pb.TransformResponse]) -> pb.TransformResponse:
    return await call
