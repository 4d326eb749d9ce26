"""The measuring sections of `scripts/gpu_check`, each run in its own process. A section yields result lines."""

import functools
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from img2img_server.bundle.component_config import read_config
from img2img_server.bundle.manifest import LIMITS, read_manifest
from img2img_server.engine.cache import Cache
from img2img_server.engine.engine import Engine
from img2img_server.engine.request import Completed, Event, Failed, Pipeline, Request
from img2img_server.engine.warmup import WarmUp
from img2img_server.runtime.common.out_of_memory import is_out_of_memory
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from img2img_server.support.device_lock import recording_at_once
from img2img_server.tools.bench_measuring import FAILURES, Work, capture, requests_of
from img2img_server.tools.bench_model import quartiles
from PIL import Image

from gpu_check import models
from gpu_check.results import Line
from gpu_check.settings import Settings
from gpu_check.works import Function, WholeRequest, difference, in_turns, one_after_another, open_graph

_ATTENTION = {"cuDNN attention": 8 | 16, "flash attention": 1 | 2 | 16}
"""Bits of the CUDA provider's sdpa_kernel: 1 flash, 2 memory-efficient, 8 cuDNN, 16 the unfused kernel as a fallback."""
_BUCKETS = (1, 2, 4, 8, 16)
_ROUNDS = 10
_PROMPT, _STRENGTH, _STEPS, _GUIDANCE = "A beautiful landscape with mountains and a lake at sunset", 0.8, 25, 7.5


def switch(settings: Settings) -> Iterator[Line]:
    """Calls without CUDA graphs whose rows alternate, compared with calls of constant rows.

    ONNX Runtime caches a convolution's plan only for the last shape (onnxruntime#23006).
    """
    section = f"UNet sd15, {settings.side('sd15')} px, not recorded"
    opened = open_graph(_graph(settings, "sd15", "unet"), settings, record=False)
    calls = {rows: opened.work(_feed(settings, "sd15", rows)) for rows in (2, 4)}
    same = {rows: _median(one_after_another([call], _ROUNDS, settings.synchronize)[0]) for rows, call in calls.items()}
    changed = dict(zip(calls, one_after_another(list(calls.values()), _ROUNDS, settings.synchronize), strict=True))
    for rows, seconds in changed.items():
        yield Line(section, f"{rows} rows, unchanged", same[rows], "ms")
        yield Line(section, f"{rows} rows after {6 - rows}", _median(seconds), "ms", note=_spread(seconds))


def replay(settings: Settings) -> Iterator[Line]:
    """CUDA graphs: time to record, replays of each number of rows, and replays whose rows alternate."""
    section = f"UNet sd15, {settings.side('sd15')} px, recorded"
    opened = open_graph(_graph(settings, "sd15", "unet"), settings)
    calls = {}
    for rows in _BUCKETS:
        begun = time.perf_counter()
        calls[rows] = opened.work(_feed(settings, "sd15", rows))
        settings.synchronize()
        recorded = "recorded in" if opened.recorded else "not recorded, first call"
        note = f"{recorded} {(time.perf_counter() - begun) * 1e3:.0f} ms"
        (seconds,) = one_after_another([calls[rows]], _ROUNDS, settings.synchronize)
        yield Line(section, f"{rows} rows", _median(seconds), "ms", note=note)
    for rows, seconds in zip((2, 4), one_after_another([calls[2], calls[4]], _ROUNDS, settings.synchronize), strict=True):
        yield Line(section, f"{rows} rows after {6 - rows}", _median(seconds), "ms", note=_spread(seconds))


def host(settings: Settings) -> Iterator[Line]:
    """A step of the engine for several guided requests, and the part of it outside the UNet's call."""
    side = settings.side("sd15")
    section = f"step of the engine, sd15, {side} px"
    pipeline = _Watched(_ours(settings, "sd15"))
    engine = Engine({"m": pipeline})
    try:
        begun = time.monotonic()
        engine.call("m", lambda: WarmUp(max(_BUCKETS), 60.0).record("m", pipeline))
        yield Line(section, "warm-up's recordings", time.monotonic() - begun, "s")
        for count in (1, 2, 4, 8):
            calls = engine.call("m", lambda count=count: _unet_seconds(settings, pipeline, 2 * count))  # type: ignore[misc]
            _run_together(engine, [_request(side, _STEPS, (seed,)) for seed in range(count)])
            step = pipeline.seconds_a_step(2 * count)
            if step is None:
                yield Line(section, f"{count} requests", note="no two consecutive steps were shared by all")
                continue
            yield Line(section, f"{count} requests, a step", step * 1e3, "ms")
            yield Line(section, f"{count} requests, outside the UNet's call", (step - calls) * 1e3, "ms")
    finally:
        engine.close()


def unet(settings: Settings, model: str) -> Iterator[Line]:
    """A UNet call of 2 rows at the model's own size: as in the server, with other options, and in PyTorch."""
    section = f"UNet {model}, {settings.side(model)} px, 2 rows"
    feed = _feed(settings, model, 2)
    graph = _graph(settings, model, "unet")
    wanted: dict[str, tuple[Path, bool, dict[str, str]]] = {"ours": (graph, True, {}), "not recorded": (graph, False, {})}
    if settings.device == "cuda" and model == "sd15":
        wanted |= {name: (graph, True, {"sdpa_kernel": str(bits)}) for name, bits in _ATTENTION.items()}
        wanted["plain graph"] = (settings.bundle(model) / "unet" / "model.onnx", True, {})
    works: dict[str, Work] = {}
    for name, (path, record, options) in wanted.items():
        try:
            opened = open_graph(path, settings, record, options)
            works[name] = opened.work(feed)
        except FAILURES as error:
            yield Line(section, name, passed=False, note=f"{type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        if record and settings.device == "cuda" and not opened.recorded:
            yield Line(section, name, passed=False, note="cannot be recorded")
    module = _torch_unet(settings, model)
    works["PyTorch"] = _torch_call(module, feed, settings)
    yield from _compared(section, works, settings, f"unet-{model}", aim=settings.aim(f"unet-{model}"))
    if settings.values and "ours" in works:
        exact = _torch_call(module.float(), feed, settings, torch.float32)
        exact.run()
        yield _error(section, "ours against PyTorch in fp32", works["ours"], exact, settings)


def vae(settings: Settings) -> Iterator[Line]:
    """VAE encoder and decoder for an image of 512 and of 1024 px, ours and PyTorch's."""
    config = models.pipeline(settings.kind("sd15")).vae.config
    module = models.filled(AutoencoderKL.from_config(config).eval(), settings.device, settings.dtype)
    module = module.to(memory_format=torch.channels_last)
    halves: dict[str, tuple[str, int, int, Callable[[torch.Tensor], torch.Tensor]]] = {
        "vae_encoder": ("sample", 3, 1, lambda pixels: module.encode(pixels, return_dict=False)[0].parameters),
        "vae_decoder": ("latent_sample", 4, 8, lambda latents: module.decode(latents, return_dict=False)[0]),
    }
    for part, (name, channels, divisor, call) in halves.items():
        opened = open_graph(_graph(settings, "sd15", part), settings)
        for side in dict.fromkeys((settings.side("sd15"), settings.side("sdxl"))):
            section = f"{part}, {side} px"
            given = torch.randn(1, channels, side // divisor, side // divisor, generator=torch.Generator().manual_seed(0))
            moved = given.to(settings.device, settings.dtype, memory_format=torch.channels_last)
            ours, theirs = opened.work({name: given}), Function(functools.partial(call, moved))
            yield from _compared(section, {"ours": ours, "PyTorch": theirs}, settings, f"{part}-{side}")
            if settings.values:
                yield _error(section, "ours against PyTorch", ours, theirs, settings)


def image(settings: Settings) -> Iterator[Line]:
    """A whole request of 25 steps at strength 0.8, from prompt and image to image, ours and PyTorch's."""
    side = settings.side("sd15")
    works: dict[str, Work] = {"ours": WholeRequest(_ours(settings, "sd15"), _request(side, _STEPS, (1,)))}
    with recording_at_once():
        works["ours"].run()
    if settings.values:  # diffusers' schedulers look values up by computed numbers
        works["PyTorch"] = _torch_request(_torch_pipeline(settings), side)
    yield from _compared(_request_section(side), works, settings, aim=settings.aim("image"))


def cold(settings: Settings) -> Iterator[Line]:
    """The time from the start of a process to the first image, with the weights' files in memory."""
    begun = time.monotonic()
    subprocess.run([sys.executable, "-m", "gpu_check", *settings.words(), "--section", "first-image"], check=True)
    line = Line("cold start", "process start to first image, sd15", time.monotonic() - begun, "s")
    yield line.at_most(settings.aim("cold"))


def first_image(settings: Settings) -> Iterator[Line]:
    """The process that `cold` times."""
    WholeRequest(_ours(settings, "sd15"), _request(settings.side("sd15"), _STEPS, (1,))).run()
    yield from ()


def memory(settings: Settings) -> Iterator[Line]:
    """A request that does not fit fails with out of memory; later requests succeed, and memory is released."""
    if settings.device != "cuda":
        yield Line("memory", "out of memory", note="skipped: memory is not bounded on a CPU")
        return
    largest = max(component.bytes for component in read_manifest(settings.bundle("sd15")).components)
    pipeline = _ours(settings, "sd15", gpu_memory=largest + (2**26 if settings.tiny else 3 * 2**29))
    small = WholeRequest(pipeline, _request(settings.side("sd15"), 4, (1,)))
    small.run()
    before = torch.cuda.mem_get_info()[0]
    note, passed = "a request that should not fit succeeded", False
    try:
        WholeRequest(pipeline, _request(2048, 4, tuple(range(8)))).run()
    except FAILURES as error:
        passed, note = is_out_of_memory(error), f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    yield Line("memory", "a request that does not fit", passed=passed, note=note)
    for number in (1, 2, 3):
        small.run()
        yield Line("memory", f"request {number} after it", passed=True, note="succeeded")
    yield Line("memory", "kept by the failed request", (before - torch.cuda.mem_get_info()[0]) / 2**20, "MiB")


def compiled(settings: Settings, model: str) -> Iterator[Line]:
    """torch.compile's UNet compared with ours; for SD 1.5 also a whole request."""
    side = settings.side(model)
    feed = _feed(settings, model, 2)
    works: dict[str, Work] = {"ours": open_graph(_graph(settings, model, "unet"), settings).work(feed)}
    module = torch.compile(_torch_unet(settings, model), mode="reduce-overhead", fullgraph=True)
    works["torch.compile"] = _torch_call(module, feed, settings)
    begun = time.monotonic()
    works["torch.compile"].run()
    settings.synchronize()
    section = f"UNet {model}, {side} px, 2 rows"
    yield Line(section, "torch.compile, first call", time.monotonic() - begun, "s")
    yield from _compared(section, works, settings)
    if model == "sd15":
        pipe = _torch_pipeline(settings)
        pipe.unet = module
        ours = WholeRequest(_ours(settings, model), _request(side, _STEPS, (1,)))
        works = {"ours": ours, "torch.compile": _torch_request(pipe, side)}
        yield from _compared(_request_section(side), works, settings)


class _Watched:
    """A pipeline that records the start time and the rows of each call of `denoise`."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._begun: list[tuple[int, float]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def denoise(self, states: Sequence[Any]) -> Sequence[Any]:
        begun = time.perf_counter()
        noises = self._pipeline.denoise(states)
        self._begun.append((sum(map(len, noises)), begun))
        return noises

    def seconds_a_step(self, rows: int) -> float | None:
        """Median seconds between the starts of consecutive calls of `rows` rows. Clears the record."""
        begun, self._begun = self._begun, []
        pairs = itertools.pairwise(begun)
        taken = [later - earlier for (one, earlier), (other, later) in pairs if one == other == rows]
        return quartiles(taken)[1] if taken else None


def _unet_seconds(settings: Settings, pipeline: Any, rows: int) -> float:
    """Median seconds of the UNet's call of `rows` rows in the pipeline, alone."""
    side = settings.side("sd15")
    call = capture(pipeline, requests_of(pipeline, (side, side), rows, 1.0, few_steps=True))["unet"]
    with recording_at_once():
        call.run()
    return quartiles(one_after_another([call], _ROUNDS, settings.synchronize)[0])[1]


def _run_together(engine: Engine, requests: Sequence[Request]) -> None:
    """Runs the requests concurrently in the engine. Raises the first error."""
    endings: SimpleQueue[Completed | Failed] = SimpleQueue()

    def listen(event: Event) -> None:
        if isinstance(event, Completed | Failed):
            endings.put(event)

    for request in requests:
        engine.submit(request, listen)
    for _ in requests:
        ending = endings.get()
        if isinstance(ending, Failed):
            raise ending.error


def _ours(settings: Settings, model: str, gpu_memory: int | None = None) -> Pipeline:
    """The server's pipeline, without a cache."""
    folder = settings.bundle(model)
    execution = Execution(settings.provider, settings.threads, gpu_memory=gpu_memory)
    return load_pipeline(folder, read_manifest(folder), execution, Cache(0))


def _graph(settings: Settings, model: str, part: str) -> Path:
    """The graph that the server opens."""
    folder = settings.bundle(model) / part
    return folder / "cuda" / "model.onnx" if settings.device == "cuda" else folder / "model.onnx"


def _feed(settings: Settings, model: str, rows: int) -> dict[str, torch.Tensor]:
    return models.unet_feed(read_config(settings.bundle(model) / "unet"), rows, settings.side(model))


def _request(side: int, steps: int, seeds: tuple[int, ...]) -> Request:
    image = Image.linear_gradient("L").resize((side, side)).convert("RGB")
    return Request("m", image, _PROMPT, None, _STRENGTH, steps, _GUIDANCE, seeds)


def _torch_unet(settings: Settings, model: str) -> Any:
    """diffusers' UNet with the weights of ours, on the device."""
    config = read_config(settings.bundle(model) / "unet")
    module = models.filled(UNet2DConditionModel.from_config(config).eval(), settings.device, settings.dtype)
    return module.to(memory_format=torch.channels_last)


def _torch_call(module: Any, feed: Mapping[str, torch.Tensor], settings: Settings, dtype: torch.dtype | None = None) -> Function:
    given = {name: value.to(settings.device, dtype or settings.dtype) for name, value in feed.items()}
    given["timestep"] = feed["timestep"].to(settings.device)
    given["sample"] = given["sample"].to(memory_format=torch.channels_last)
    sample, timestep, text = (given.pop(name) for name in ("sample", "timestep", "encoder_hidden_states"))
    return Function(lambda: module(sample, timestep, text, added_cond_kwargs=given, return_dict=False)[0])


def _torch_pipeline(settings: Settings) -> Any:
    """diffusers' pipeline with random weights, on the device."""
    pipe = models.pipeline(settings.kind("sd15"))
    for module in (pipe.text_encoder, pipe.vae, pipe.unet):
        models.filled(module, settings.device, settings.dtype)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _torch_request(pipe: Any, side: int) -> Function:
    request = _request(side, _STEPS, (1,))
    generator = torch.Generator("cpu")
    return Function(
        lambda: pipe(
            request.prompt,
            image=request.image,
            strength=request.strength,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            generator=generator.manual_seed(1),
        )
    )


def _compared(
    section: str, works: Mapping[str, Work], settings: Settings, floor: str = "", aim: float | None = None
) -> Iterator[Line]:
    """A line for each work, timed in turns. Ours has the target, and torch.compile must be slower."""
    floor_ms = settings.floor(floor)
    taken = in_turns(works, settings.seconds, settings.synchronize)
    for name, seconds in taken.items():
        note = _spread(seconds) + (f", {_median(seconds) / floor_ms:.2f} x floor" if floor_ms else "")
        line = Line(section, name, _median(seconds), "ms", note=note)
        yield line.at_most(aim) if name == "ours" else line
    if "torch.compile" in taken:
        ratio = Line(section, "torch.compile over ours", _median(taken["torch.compile"]) / _median(taken["ours"]), "x")
        yield ratio.at_least(None if settings.tiny else 1.0)


def _error(section: str, name: str, ours: Any, theirs: Function, settings: Settings) -> Line:
    """The relative error of our output, compared with PyTorch's."""
    limit = LIMITS["fp16" if settings.precision == "fp16" else "fp32"].relative_error
    return Line(section, name, difference(ours.outputs[0], theirs.result), "relative").at_most(limit)


def _request_section(side: int) -> str:
    return f"img2img sd15, {side} px, {_STEPS} steps x {_STRENGTH}"


def _median(seconds: Sequence[float]) -> float:
    """The median in milliseconds."""
    return quartiles(seconds)[1] * 1e3


def _spread(seconds: Sequence[float]) -> str:
    lower, _, upper = quartiles(seconds)
    return f"{lower * 1e3:.2f} to {upper * 1e3:.2f} ms"


SECTIONS: dict[str, Callable[[Settings], Iterator[Line]]] = {
    "switch": switch,
    "replay": replay,
    "host": host,
    "unet-sd15": lambda settings: unet(settings, "sd15"),
    "unet-sdxl": lambda settings: unet(settings, "sdxl"),
    "vae": vae,
    "image": image,
    "cold": cold,
    "first-image": first_image,
    "memory": memory,
    "compile-sd15": lambda settings: compiled(settings, "sd15"),
    "compile-sdxl": lambda settings: compiled(settings, "sdxl"),
}
