"""A user's own program passes mypy --strict against the installed package, and one that is wrong does not."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

RIGHT = """
import asyncio
from pathlib import Path

from PIL import Image

from img2img_client import (
    AsyncClient, Asset, Client, Completed, Img2ImgError, ModelReference, Overloaded, Progress, Queued, RetryPolicy, Started,
    TransformOptions, TransformResult,
)


def log_retry(attempt: int, error: Img2ImgError, wait: float) -> None:
    print(attempt, error.status, wait)


def follow(client: Client, options: TransformOptions) -> TransformResult | None:
    with client.transform_stream(Path("a.png"), timeout=3, **options) as events:
        for event in events:
            match event:
                case Queued(position=position, eta_seconds=eta):
                    print(position + 1, 0.0 if eta is None else eta)
                case Started(seed=seed):
                    print(seed + 1)
                case Progress(step=step, step_count=count, preview_image=preview):
                    print(step / count, preview.size if preview is not None else None)
                case Completed(result=result):
                    return result
    return None


async def work() -> Image.Image:
    async with AsyncClient("dns:///img2img:50051", retries=None) as client:
        asset: Asset = await client.upload(Image.new("RGB", (8, 8)))
        async with client.transform_stream(asset, seed=1) as events:
            async for event in events:
                if isinstance(event, Completed):
                    return event.result.image
        data: bytes = await client.download(asset)
        first, second = await asyncio.gather(client.transform(data), client.transform("a.png", format="webp", quality=80))
        return (first or second).image


with Client(["127.0.0.1:50051", "127.0.0.1:50052"], retries=RetryPolicy(max_attempts=3, on_retry=log_retry)) as client:
    try:
        follow(client, {"prompt": "x", "strength": 0.5, "model": ModelReference(repo_id="a/b")})
    except Overloaded as error:
        print(error.retry_after)
asyncio.run(work())
"""
WRONG = """
from img2img_client import AsyncClient, Client

client, other = Client(), AsyncClient()
client.transform("a.png", strenght=0.5)
client.transform("a.png", strength="0.5")
client.transform("a.png", format="gif")
client.transform(3)
client.transform_stream("a.png", seed=1.5)
client.models().id
other.transform("a.png").image
Client(retries=3)
Client(target=50051)
"""


@pytest.mark.timeout(200)
def test_a_program_is_checked_against_the_client(tmp_path: Path) -> None:
    """Outside of the repository, so that the package is found as any installed one: by its py.typed."""
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(WRONG)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir=cache", "right.py", "wrong.py"]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True, timeout=180)
    complaints = re.findall(r"^(\w+)\.py:(\d+): error", done.stdout, re.MULTILINE)
    assert done.stderr == ""
    lines = len(WRONG.splitlines())
    assert {(name, int(line)) for name, line in complaints} == {("wrong", line) for line in range(5, lines + 1)}, done.stdout
