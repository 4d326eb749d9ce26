"""An AsyncClient behind a Client's methods, so that one test covers both."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar, Unpack

from img2img_client import AsyncClient, AsyncTransformStream, ImageInput, TransformEvent, TransformOptions

_Result = TypeVar("_Result")
_PATIENCE = 60.0


class BlockingStream(Iterator[TransformEvent]):
    """An AsyncTransformStream's events, for a thread that waits."""

    def __init__(self, owner: "Blocking", stream: AsyncTransformStream) -> None:
        self._owner = owner
        self._stream = stream

    @property
    def request_id(self) -> str:
        return self._stream.request_id

    def __next__(self) -> TransformEvent:
        async def following() -> TransformEvent | None:
            return await anext(self._stream, None)

        event = self._owner.wait(following())
        if event is None:
            raise StopIteration
        return event

    def close(self) -> None:
        self._owner.wait(self._stream.close())

    def __enter__(self) -> "BlockingStream":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Blocking:
    """Runs an AsyncClient on an event loop of its own thread. Methods that are not here are AsyncClient's, waited for."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.client = AsyncClient(*arguments, **settings)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    @property
    def target(self) -> str:
        return self.client.target

    def wait(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_PATIENCE)

    def transform_stream(
        self,
        image: ImageInput,
        *,
        timeout: float | None = None,
        request_id: str | None = None,
        **options: Unpack[TransformOptions],
    ) -> BlockingStream:
        return BlockingStream(self, self.client.transform_stream(image, timeout=timeout, request_id=request_id, **options))

    def watch_health(self, *, timeout: float | None = None) -> Iterator[bool]:
        changes = self.client.watch_health(timeout=timeout)

        async def following() -> bool | None:
            return await anext(changes, None)

        while (serving := self.wait(following())) is not None:
            yield serving

    def close(self) -> None:
        self.wait(self.client.close())

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)
        return lambda *arguments, **settings: self.wait(method(*arguments, **settings))

    def __enter__(self) -> "Blocking":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
        self.wait(_settle())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_PATIENCE)
        self._loop.close()


async def _settle() -> None:
    """Waits for cancelled tasks to end."""
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    await asyncio.wait(others, timeout=_PATIENCE) if others else None
