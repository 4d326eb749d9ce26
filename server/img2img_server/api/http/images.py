"""Edits and variations: converts a form to a TransformRequest and runs it with ImageToImageService."""

import math
import time
from contextlib import ExitStack, aclosing
from typing import Any

from img2img.v1 import asset_pb2
from img2img.v1 import image_to_image_pb2 as pb

from img2img_server.api.assets import AssetService
from img2img_server.api.http import answers, fields
from img2img_server.api.http.exchange import EVENTS, Exchange
from img2img_server.api.http.fields import Draft
from img2img_server.api.http.forms import BodyLimits, read_form
from img2img_server.api.transform import ImageToImageService
from img2img_server.codecs.pool import ImageMemory
from img2img_server.engine.interface import Accepted, EngineInterface
from img2img_server.support.call import Call
from img2img_server.support.fair_queue import FairThreads

_QUICK = 2**20
"""Maximum bytes of images that are encoded as base64 on the event loop, which takes 1 ms."""
_THREADS = 2
_HEADERS = {"cache-control": "no-store"}
_STREAM_HEADERS = {**_HEADERS, "x-accel-buffering": "no"}
"""The second header disables nginx's buffering."""


class Images:
    """Runs requests by `transforms`. `memory` accounts for their bodies; `runner` refuses requests while the queue is full."""

    def __init__(
        self,
        transforms: ImageToImageService,
        assets: AssetService,
        runner: EngineInterface,
        memory: ImageMemory,
        limits: BodyLimits,
    ) -> None:
        self._transforms, self._assets, self._runner, self._memory, self._limits = transforms, assets, runner, memory, limits
        self._threads = FairThreads(_THREADS, "img2img-http")

    async def edit(self, exchange: Exchange, call: Call, variation: bool) -> None:
        """Answers POST /v1/images/edits, or POST /v1/images/variations."""
        with self._runner.reserve(call.client):
            pass  # refuses the request before its body is read if the queue is full; the slot is taken after the body
        with ExitStack() as held:
            form = await read_form(exchange.headers, exchange.receive, call, self._memory, held, self._limits)
            draft = fields.read(form, variation)
            del form
            await exchange.while_connected(self._stream(exchange, draft) if draft.stream else self._once(exchange, draft))

    async def asset(self, exchange: Exchange) -> None:
        """Answers GET /v1/assets/{id} with the image's file."""
        async with aclosing(self._assets.GetAsset(asset_pb2.GetAssetRequest(id=exchange.path["id"]), exchange)) as responses:
            async for response in responses:
                if response.HasField("asset"):
                    size = {"content-length": str(response.asset.size)}
                    await exchange.begin(
                        200, {**_HEADERS, **size, "x-content-type-options": "nosniff"}, response.asset.media_type
                    )
                else:
                    await exchange.write(response.chunk)
        await exchange.write(b"", more=False)

    async def _once(self, exchange: Exchange, draft: Draft) -> None:
        headers = dict(_HEADERS)

        def accept(accepted: Accepted) -> None:
            headers.update(answers.queue_headers(accepted.position, accepted.eta))

        result = await self._transforms.transform(draft.message, exchange, accept, draft.reading)
        headers["openai-processing-ms"] = str(math.ceil((time.monotonic() - exchange.began) * 1000))
        await exchange.answer(200, await self._written(answers.images, result, exchange.base), headers)

    async def _stream(self, exchange: Exchange, draft: Draft) -> None:
        """Answers with events. Headers are sent with the first event, so a refused request gets the status of its error."""
        begun, previews = False, 0
        asked = pb.TransformStreamRequest(request=draft.message)
        stream = self._transforms.TransformStream(asked, exchange, draft.reading)
        async with aclosing(stream) as events:
            async for event in events:
                if not begun:
                    eta = event.queued.eta_seconds if event.queued.HasField("eta_seconds") else None
                    headers = answers.queue_headers(event.queued.position, eta)
                    await exchange.begin(200, {**_STREAM_HEADERS, **headers}, EVENTS)
                    begun = True
                if event.HasField("completed"):
                    for data in await self._written(answers.completed, event.completed, exchange.base):
                        await exchange.write(data)
                    continue
                if event.progress.HasField("preview") and previews == draft.partial_images:
                    event.progress.ClearField("preview")
                await exchange.write(answers.progress(event, previews))
                previews += event.progress.HasField("preview")
        await exchange.write(b"", more=False)

    async def _written(self, write: Any, result: pb.TransformResponse, base: str) -> Any:
        """Serializes a result by `write`, on a thread if the images are large."""
        if answers.size_of(result) <= _QUICK:
            return write(result, base)
        return await self._threads.run(write, result, base)
