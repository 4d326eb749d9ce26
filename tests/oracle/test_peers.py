"""The peers of scripts/bench load answer, and draw what diffusers draws."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bench_load.images import largest_difference
from bench_load.sending import Record, connected
from bench_load.servers import ServerProcess, command, started
from bench_load.workloads import Job, Source

PEERS = ("lock", "batching", "pytorch")
JOBS = [Job("a lake at sunset", Source(size=(64, 64)), 4, 0.8, 7.5, seed) for seed in (3, 4, 5)]
"""One setting, so that the batching peer runs them together."""


@pytest.fixture(scope="module")
def peers(
    bundle: Callable[[str], Path], tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, ServerProcess]]:
    folder = tmp_path_factory.mktemp("peers")
    model, exported = tiny_model("sd1"), bundle("sd1")
    with started({name: command(name, exported, model) for name in PEERS}, folder) as servers:
        yield servers


async def _ask(server: ServerProcess) -> tuple[list[bytes], list[Record]]:
    async with connected(server.target) as sender:
        images = await asyncio.gather(*(sender.send(job) for job in JOBS))
        return images, sender.records


@pytest.mark.parametrize("name", PEERS)
async def test_peer_images_match_pytorch(peers: dict[str, ServerProcess], name: str) -> None:
    async with connected(peers["pytorch"].target) as sender:
        alone = [await sender.send(job) for job in JOBS]
    images, records = await _ask(peers[name])
    assert [record.error for record in records] == [""] * len(JOBS)
    assert all(record.queue is not None and 0 <= record.queue <= record.latency for record in records)
    assert max(map(largest_difference, images, alone)) <= 1
    assert largest_difference(images[0], images[1]) > 1, "another seed makes another image"
