"""The first section: checks that measurements are possible on this machine; if not, reports the reason in one line."""

import logging
import time
from collections.abc import Iterator

import torch
from img2img_server.bundle.component_config import read_config
from img2img_server.bundle.manifest import LIMITS, read_manifest
from img2img_server.engine.cache import Cache
from img2img_server.runtime.common.cpu import machine
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from img2img_server.runtime.onnx import providers

from gpu_check.models import unet_feed
from gpu_check.results import Line
from gpu_check.settings import Settings
from gpu_check.works import difference, open_graph

_SECTION = "preflight"
_MODEL = "tiny-sd15"
_SIDE = 64


def preflight(settings: Settings) -> Iterator[Line]:
    """Checks the driver, the device and the libraries, opens a tiny bundle, and runs its UNet with 2 and 4 rows and recorded.

    Raises SystemExit with the reason if nothing can be measured. Wrong values are lines that did not pass.
    """
    begun = time.monotonic()
    for name, value in machine().items():
        yield Line(_SECTION, name, note=value)
    if settings.device == "cuda":
        yield from _device(settings)
    yield from _bundle(settings)
    yield from _unet(settings)
    yield Line(_SECTION, "all of it", time.monotonic() - begun, "s").at_most(settings.aim("preflight"))


def _device(settings: Settings) -> Iterator[Line]:
    found = providers.probe("cuda")
    if found.problem:
        raise SystemExit(f"ONNX Runtime cannot use CUDA: {found.problem}")
    if not torch.cuda.is_available():
        raise SystemExit(f"PyTorch {torch.__version__} finds no usable GPU: install a CUDA build that supports the driver")
    if settings.values and float(torch.ones(1000, device="cuda").sum()) != 1000:
        raise SystemExit("the GPU computes wrong sums")
    free, total = torch.cuda.mem_get_info()
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    libraries = f"compute capability {capability}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"  # type: ignore[no-untyped-call]
    yield Line(_SECTION, "device and libraries", note=f"{found.detail}, {libraries}")
    yield Line(_SECTION, "free memory", free / 2**30, "GiB", note=f"of {total / 2**30:.1f}")


def _bundle(settings: Settings) -> Iterator[Line]:
    warnings = _Warnings()
    logging.getLogger("img2img_server").addHandler(warnings)
    folder, begun = settings.bundle(_MODEL), time.monotonic()
    pipeline = load_pipeline(folder, read_manifest(folder), Execution(settings.provider, settings.threads), Cache(0))
    note = f"{pipeline.engine}, rows recorded: {', '.join(map(str, pipeline.row_buckets)) or 'none'}"
    yield Line(_SECTION, "a tiny bundle opens", time.monotonic() - begun, "s", note=note)
    for text in warnings.texts:
        yield Line(_SECTION, "warning", passed=False, note=text)


def _unet(settings: Settings) -> Iterator[Line]:
    folder = settings.bundle(_MODEL) / "unet"
    feeds = {rows: unet_feed(read_config(folder), rows, _SIDE) for rows in (2, 4)}
    plain = folder / "model.onnx"
    graph = folder / "cuda" / "model.onnx" if settings.device == "cuda" else plain
    eager = open_graph(graph, settings, record=False)
    (two,), (four,) = (eager.work(feed).outputs for feed in feeds.values())
    if four.shape[0] != 4 or two.shape[0] != 2:
        raise SystemExit(f"the UNet returns {tuple(two.shape)} and {tuple(four.shape)} for 2 and 4 rows")
    yield Line(_SECTION, "UNet, 2 and 4 rows", note="ran")
    recording = open_graph(graph, settings)
    replay = recording.work(feeds[2])
    replay.run()
    note = "replayed" if recording.recorded else "ran, not recorded"
    yield Line(_SECTION, "UNet, recorded", passed=recording.recorded if settings.device == "cuda" else None, note=note)
    if not settings.values:
        return
    limit = LIMITS["fp16" if settings.precision == "fp16" else "fp32"].relative_error
    yield Line(_SECTION, "recorded against eager", difference(replay.outputs[0], two), "relative").at_most(limit)
    if graph != plain:
        (other,) = open_graph(plain, settings, record=False).work(feeds[2]).outputs
        yield Line(_SECTION, "fused against plain", difference(two, other), "relative").at_most(limit)


class _Warnings(logging.Handler):
    """Collects the server's warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage().splitlines()[0])
