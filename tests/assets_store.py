"""Asset stores for tests: one that is open within a block, on a manual clock."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from img2img_server.assets.store import AssetStore
from img2img_server.config import AssetSettings

DAY = 24 * 3600.0


class Time:
    """A manual clock. It begins at the filesystem's time."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def opened(url: str | Path, clock: Callable[[], float] | None = None, **settings: Any) -> AsyncIterator[AssetStore]:
    asset_settings = AssetSettings(url=str(url), **settings)
    store = AssetStore(asset_settings, clock) if clock is not None else AssetStore(asset_settings)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def put(store: AssetStore, data: bytes, owner: str = "shared") -> str:
    async with store.reserve(owner, len(data)) as room:
        return (await store.put(owner, data, room)).id


async def streamed(store: AssetStore, asset_id: str, owner: str = "shared") -> bytes:
    return b"".join([block async for block in store.stream(owner, asset_id)])


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
