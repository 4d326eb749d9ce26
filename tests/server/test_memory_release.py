"""Unloading a real model frees its memory, repeatedly, in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from covering import nightly_but

_CYCLES = 6
_GROWTH = {"sd1": 10 * 2**20, "demo": 10 * 2**20, "sana-sprint": 40 * 2**20}
"""Growth in bytes from the second cycle to the last that is malloc's and no leak. In PyTorch 8 to 26 MB were seen, up and down;
the model itself has 75 MB, so a leak of a quarter of it in each cycle would be detected."""

_SCRIPT = """
import asyncio, gc, json, sys, weakref
from pathlib import Path
from PIL import Image
from img2img_server.bundle.manifest import Source
from img2img_server.config import ModelSettings
from img2img_server.engine.cache import Cache
from img2img_server.engine.engine import Engine
from img2img_server.engine.request import Completed, Failed, Request
from img2img_server.runtime.execution import Execution
from img2img_server.models.memory import resident_bytes
from img2img_server.models.registry import ModelRegistry
from img2img_server.runtime.loader import load_pipeline
from img2img_server.runtime.tensorrt.candidate import RunnerCache
from img2img_server.models.residency import Residency

def health(name, serving):
    pass

async def main(store_folder, cycles):
    cache, runner_cache = Cache(2**26), RunnerCache()
    load = lambda path, manifest: load_pipeline(path, manifest, Execution("cpu", threads=1), cache, keep=runner_cache.keep)
    settings = ModelSettings(preload=("none",))
    store = ModelRegistry.load(store_folder, load, settings=settings)
    engine = Engine(store.pipelines())
    engine.start()
    residency = Residency(settings, store, engine, health)
    (name,) = [model.id for model in store]
    report = {"unloaded": [], "loaded": [], "freed": [], "measured": [], "alive": [], "cached": []}
    for _ in range(cycles):
        async with residency.using(Source(path=name)) as model:
            watched = weakref.ref(model.pipeline)
            width, height = model.pipeline.native_size
            image = Image.new("RGB", (width, height), "teal")
            request = Request(name, image, "a lake", None, 1.0, 3, 7.5, (1,), image_digest=b"x" * 16)
            loop, ended = asyncio.get_running_loop(), asyncio.Event()
            def listen(event):
                if isinstance(event, (Completed, Failed)):
                    assert isinstance(event, Completed), event
                    loop.call_soon_threadsafe(ended.set)
            engine.submit(request, listen)
            await ended.wait()
        del model
        report["loaded"].append(resident_bytes())
        report["measured"].append(store.get(name).memory)
        report["freed"].append(await residency.unload(name))
        report["unloaded"].append(resident_bytes())
        report["alive"].append(watched() is not None)
        report["cached"].append(cache.stats.entries)
        report["shelved"] = len(runner_cache._runners)
    await residency.close()
    engine.close()
    print(json.dumps(report))

asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
"""


@pytest.mark.parametrize("name", nightly_but(["sd1", "demo", "sana-sprint"], "sd1"))
def test_unloading_a_model_releases_its_memory(name: str, bundle: Callable[[str], Path], tmp_path: Path) -> None:
    """Stepped and opaque, on graphs and in PyTorch: nothing refers to an unloaded pipeline, and from the second cycle on the
    process does not grow by the size of a leak."""
    store = tmp_path / "store"
    store.mkdir()
    (store / name).symlink_to(bundle(name))
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-W", "ignore", "-c", _SCRIPT, str(store), str(_CYCLES)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout.splitlines()[-1])
    print(name, json.dumps(report))
    assert report["alive"] == [False] * _CYCLES
    assert report["cached"] == [0] * _CYCLES
    assert report["shelved"] == 0
    unloaded = report["unloaded"]
    # The least of the last three: malloc keeps some now and then, and gives it back the next time.
    assert min(unloaded[-3:]) - unloaded[1] < _GROWTH[name]
    if name == "demo":
        weights = 13 * 2**20
        assert all(freed > weights for freed in report["freed"][1:])
        assert all(took > weights for took in report["measured"])
