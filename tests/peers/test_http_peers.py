"""The peers of scripts/bench peers that speak HTTP answer, and draw what diffusers draws."""

import asyncio
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bench_load.sending import connected
from bench_load.servers import ServerProcess, command, started
from bench_load.workloads import Job, Source
from PIL import Image, ImageChops, ImageStat

PEERS = ("litserve", "bentoml")
"""Their environment is made by scripts/peers_setup."""
JOBS = [Job("a lake at sunset", Source(size=(64, 64)), 4, 0.8, 7.5, seed) for seed in (3, 4, 5)]


@pytest.fixture(scope="module")
def servers(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ServerProcess]]:
    folder, model = tmp_path_factory.mktemp("peers"), tiny_model("sd1")
    with started({name: command(name, model, model) for name in ("pytorch", *PEERS)}, folder) as servers:
        yield servers


@pytest.mark.parametrize("name", PEERS)
async def test_peer_draws_an_image_for_each_seed(servers: dict[str, ServerProcess], name: str) -> None:
    """In bfloat16 if the CPU supports it, so the images are only near those of PyTorch in float32."""
    async with connected(servers["pytorch"].target) as sender:
        alone = [await sender.send(job) for job in JOBS]
    async with connected(servers[name].target) as sender:
        images = await asyncio.gather(*(sender.send(job) for job in JOBS))
        assert [record.error for record in sender.records] == [""] * len(JOBS)
    for image, expected, other in zip(images, alone, [*alone[1:], alone[0]], strict=True):
        assert mean_difference(image, expected) < 0.5 * mean_difference(image, other)


def mean_difference(one: bytes, other: bytes) -> float:
    """The mean difference of two image files, of 255."""
    first, second = (Image.open(io.BytesIO(data)).convert("RGB") for data in (one, other))
    return float(sum(ImageStat.Stat(ImageChops.difference(first, second)).mean) / 3)
