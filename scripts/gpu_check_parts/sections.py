"""The sections of `scripts/gpu_check`, each run in a process of its own. A section gives lines of the table.

What is of CUDA and TensorRT is not yet run on a GPU: only the CPU's half of it is (`--tiny --provider cpu`).
"""

import ctypes
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_models import MODELS
from diffusers import AutoencoderKL, AutoPipelineForImage2Image, UNet2DConditionModel
from img2img_server.bench_report import quartiles
from img2img_server.bundle import read_manifest
from img2img_server.engine.cache import Cache
from img2img_server.engine.request import Pipeline, Request
from img2img_server.execution import Bucket, Execution
from img2img_server.pipelines.loader import load_pipeline
from img2img_server.pipelines.measuring import FAILURES, Case, Product, Work, capture, machine, requests_of
from PIL import Image

from gpu_check_parts.bundles import make_bundle
from gpu_check_parts.settings import Line, Settings
from gpu_check_parts.works import Bound, Function, Picture, in_turns, psnr

_ATTENTION = {"cuDNN attention": 8 | 16, "flash attention": 1 | 2 | 16}
"""Bits of the CUDA provider's sdpa_kernel: 1 flash, 2 efficient, 8 cuDNN's, 16 the unfused kernel for what others don't take."""
_TENSORRT = "libnvinfer.so.10"
_REQUEST = ("A beautiful landscape with mountains and a lake at sunset", 0.8, 25, 7.5)


def about(settings: Settings) -> list[Line]:
    """The machine, what can be used of it, and its measured peak."""
    lines = [Line("machine", name, note=value) for name, value in machine().items()]
    product = Product(settings.device, settings.precision, settings.threads)
    cases = in_turns({"peak": product}, settings.seconds / 4, settings.synchronize)
    rate = product.operations / quartiles(cases["peak"].seconds)[1] / 1e12
    lines.append(Line("machine", f"{settings.precision} matrix product", rate, "TFLOP/s"))
    bound = next((library for library in (_TENSORRT,) if _loads(library)), None)
    return [*lines, Line("machine", "TensorRT", note=bound or f"{_TENSORRT} is not there")]


def build(settings: Settings, model: str) -> list[Line]:
    """Makes a model with random weights, saves it for PyTorch, and exports it."""
    begun = time.monotonic()
    torch.manual_seed(0)
    with torch.device(settings.device), torch.no_grad():
        pipeline = MODELS[settings.kind(model)]()
    pipeline.to(settings.device, settings.dtype)
    made = time.monotonic() - begun
    pipeline.save_pretrained(settings.weights(model), safe_serialization=True)
    begun = time.monotonic()
    problems = make_bundle(pipeline, settings.bundle(model), settings.precision)
    lines = [Line(f"build {model}", "random weights", made, "s"), Line(f"build {model}", "export", time.monotonic() - begun, "s")]
    return lines + [Line(f"build {model}", "fused graphs", passed=False, note=problem) for problem in problems]


def compiling(settings: Settings, model: str) -> list[Line]:
    """Fills torch.compile's cache, while the exporter keeps other cores busy."""
    if not settings.compile:
        return []
    begun = time.monotonic()
    torch.manual_seed(0)
    with torch.device(settings.device), torch.no_grad():
        unet = MODELS[settings.kind(model)]().unet.to(settings.dtype)
    call = _unet_call(_compiled(unet), _unet_feed(unet.config, settings, model), settings)
    call.run()
    return [Line(f"build {model}", "torch.compile, its first call", time.monotonic() - begun, "s")]


def unet(settings: Settings, model: str) -> list[Line]:
    """A UNet's call with two rows at the model's own size: ours, sessions of other options, PyTorch."""
    side = settings.side(model)
    works: dict[str, Work] = {}
    problems: list[Line] = []
    section = f"UNet {model}, {side} px, 2 rows"

    def add(name: str, make: Callable[[], Work]) -> None:
        try:
            works[name] = make()
            works[name].run()
        except FAILURES as error:
            works.pop(name, None)
            problems.append(Line(section, name, passed=False, note=f"{type(error).__name__}: {str(error).splitlines()[0]}"))

    module = UNet2DConditionModel.from_pretrained(settings.weights(model) / "unet", torch_dtype=settings.dtype)
    module = module.eval().to(settings.device)
    feed = _unet_feed(module.config, settings, model)
    add("ours", lambda: capture(_ours(settings, model), requests_of(_last(), (side, side), 2, 1.0, few_steps=True))["unet"])
    shapes = {"out_sample": feed["sample"].shape}
    for name, (graph, options) in _graphs(settings, model).items():
        add(name, lambda graph=graph, options=options: Bound(graph, settings.provider, options, feed, shapes, settings.threads))  # type: ignore[misc]
    add("PyTorch", lambda: _unet_call(module.to(memory_format=torch.channels_last), feed, settings))
    if settings.compile:
        add("torch.compile", lambda: _unet_call(_compiled(module), feed, settings))
    return [*_timed(section, in_turns(works, settings.seconds, settings.synchronize), settings.floor(f"unet-{model}")), *problems]


def vae(settings: Settings, model: str) -> list[Line]:
    """The VAE's two halves on one picture: ours and PyTorch."""
    side = settings.side(model)
    pipeline = _ours(settings, model)
    calls = capture(pipeline, requests_of(pipeline, (side, side), 1, 1.0, few_steps=True))
    module = AutoencoderKL.from_pretrained(settings.weights(model) / "vae", torch_dtype=settings.dtype).eval()
    module = module.to(settings.device, memory_format=torch.channels_last)
    pixels = calls["vae_encoder"].feed["sample"].to(settings.device, settings.dtype)
    latents = calls["vae_decoder"].feed["latent_sample"].to(settings.device, settings.dtype)
    lines: list[Line] = []
    for name, call in (("vae_encoder", lambda: module.encode(pixels)), ("vae_decoder", lambda: module.decode(latents))):
        works: dict[str, Work] = {"ours": calls[name], "PyTorch": Function(call)}
        cases = in_turns(works, settings.seconds / 2, settings.synchronize)
        lines += _timed(f"{name} {model}, {side} px", cases, settings.floor(f"{name}-{model}"))
    return lines


def picture(settings: Settings) -> list[Line]:
    """A whole request, 25 steps at strength 0.8, and how far the picture is from PyTorch's in fp32."""
    side = settings.side("sd15")
    section = f"img2img sd15, {side} px, 25 steps x 0.8"
    image = Image.linear_gradient("L").resize((side, side)).convert("RGB")
    prompt, strength, steps, guidance = _REQUEST
    ours = Picture(_ours(settings, "sd15"), Request("", image, prompt, None, strength, steps, guidance, (1,)))
    pipes = {"PyTorch": _torch_pipeline(settings, settings.dtype)}
    if settings.compile:
        pipes["torch.compile"] = _torch_pipeline(settings, settings.dtype)
        pipes["torch.compile"].unet = _compiled(pipes["torch.compile"].unet)
    drawn: dict[str, Image.Image] = {}

    def draw(name: str, pipe: Any) -> None:
        generator = torch.Generator("cpu").manual_seed(1)
        arguments = {"strength": strength, "num_inference_steps": steps, "guidance_scale": guidance, "generator": generator}
        drawn[name] = pipe(prompt, image=image, **arguments).images[0]

    works: dict[str, Work] = {"ours": ours}
    works |= {name: Function(lambda name=name, pipe=pipe: draw(name, pipe)) for name, pipe in pipes.items()}  # type: ignore[misc]
    lines = _timed(section, in_turns(works, settings.seconds, settings.synchronize), None)
    lines[0] = lines[0].limited(settings.floor("picture"), 1.0)
    draw("fp32", _torch_pipeline(settings, torch.float32))
    for name, image_of in {"ours": ours.images[0], "PyTorch": drawn["PyTorch"]}.items():
        decibels = psnr(image_of, drawn["fp32"])
        passed = decibels >= settings.least_psnr if name == "ours" else None
        lines.append(Line(section, f"{name}, PSNR against fp32", decibels, "dB", passed=passed))
    return lines


def cold(settings: Settings) -> list[Line]:
    """From the start of a process to the first picture."""
    begun = time.monotonic()
    command = [sys.executable, str(Path(__file__).parents[1] / "gpu_check.py"), *settings.words(), "--section", "first-picture"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    line = Line("cold start", "process start to first picture, sd15", time.monotonic() - begun, "s")
    return [line.limited(settings.floor("cold"), 1.0)]


def first_picture(settings: Settings) -> list[Line]:
    """What `cold` times."""
    side = settings.side("sd15")
    image = Image.linear_gradient("L").resize((side, side)).convert("RGB")
    prompt, strength, steps, guidance = _REQUEST
    Picture(_ours(settings, "sd15"), Request("", image, prompt, None, strength, steps, guidance, (1,))).run()
    return []


def memory(settings: Settings) -> list[Line]:
    """A request that does not fit fails for want of memory, and the next one is drawn."""
    from img2img_server.pipelines.memory import is_out_of_memory

    if settings.device != "cuda":
        return [Line("memory", "out of memory", note="not tried: a CPU's memory has no bound")]
    weights = sum(component.bytes for component in read_manifest(settings.bundle("sd15")).components)
    pipeline = _ours(settings, "sd15", gpu_memory=weights + 2**30)
    note, passed = "a request that was not to fit was drawn", False
    try:
        _draw(pipeline, 2048, tuple(range(8)))
    except FAILURES as error:
        passed, note = is_out_of_memory(error), f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    _draw(pipeline, settings.side("sd15"), (1,))
    return [Line("memory", "too large a request", passed=passed, note=note), Line("memory", "the next request", passed=True)]


def tensorrt(settings: Settings) -> list[Line]:
    """TensorRT's engine of the plain UNet, where its libraries are."""
    section = "TensorRT"
    if settings.device != "cuda" or not _loads(_TENSORRT):
        return [Line(section, "UNet sd15", note=f"not tried: {_TENSORRT} is not there")]
    folder = settings.bundle("sd15")
    config = UNet2DConditionModel.load_config(settings.weights("sd15") / "unet")
    feed = _unet_feed(config, settings, "sd15")
    options = {"trt_fp16_enable": "1", "trt_engine_cache_enable": "1", "trt_engine_cache_path": str(settings.folder / "trt")}
    begun = time.monotonic()
    shapes = {"out_sample": feed["sample"].shape}
    bound = Bound(folder / "unet" / "model.onnx", "tensorrt", options, feed, shapes, settings.threads)
    bound.run()
    built = Line(section, "engine of the UNet, built", time.monotonic() - begun, "s")
    cases = in_turns({"UNet sd15, 2 rows": bound}, settings.seconds, settings.synchronize)
    return [built, *_timed(section, cases, settings.floor("unet-sd15"))]


_loaded: list[Pipeline] = []


def _last() -> Pipeline:
    return _loaded[-1]


def _ours(settings: Settings, model: str, gpu_memory: int | None = None) -> Pipeline:
    """The server's pipeline, prepared for the model's own size. Nothing is kept from request to request."""
    folder, side = settings.bundle(model), settings.side(model)
    buckets = (Bucket(side, side, 2),)
    execution = Execution(settings.provider, settings.threads, buckets=buckets, gpu_memory=gpu_memory)
    _loaded.append(load_pipeline(folder, read_manifest(folder), execution, Cache(0)))
    return _loaded[-1]


def _graphs(settings: Settings, model: str) -> dict[str, tuple[Path, dict[str, str]]]:
    """Sessions to compare: the graph, and options of the provider."""
    plain = settings.bundle(model) / "unet" / "model.onnx"
    if settings.device != "cuda":
        return {"session": (plain, {})}
    fused = plain.parent / "cuda" / "model.onnx"
    base = {"cudnn_conv_algo_search": "HEURISTIC"}
    graph = {"enable_cuda_graph": "1"}
    found = {"fused": (fused, base), "fused, CUDA graph": (fused, base | graph)}
    found |= {f"fused, {name}": (fused, base | graph | {"sdpa_kernel": str(bits)}) for name, bits in _ATTENTION.items()}
    found["fused, exhaustive search"] = (fused, graph | {"cudnn_conv_algo_search": "EXHAUSTIVE"})
    if model == "sd15":
        found |= {"plain": (plain, base | graph), "plain, NHWC": (plain, base | graph | {"prefer_nhwc": "1"})}
    return {name: entry for name, entry in found.items() if entry[0].is_file()}


def _unet_feed(config: Any, settings: Settings, model: str) -> dict[str, torch.Tensor]:
    """Two rows at the model's own size, random."""
    side = settings.side(model) // 8
    feed = {
        "sample": torch.randn(2, config["in_channels"], side, side),
        "timestep": torch.tensor([801.0, 401.0]),
        "encoder_hidden_states": torch.randn(2, 77, config["cross_attention_dim"]),
    }
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        feed |= {"text_embeds": torch.randn(2, pooled), "time_ids": torch.full((2, 6), float(8 * side))}
    return {name: value.to(settings.device) for name, value in feed.items()}


def _unet_call(module: Any, feed: dict[str, torch.Tensor], settings: Settings) -> Function:
    given = {name: value.to(settings.dtype) if name != "timestep" else value for name, value in feed.items()}
    given["sample"] = given["sample"].to(memory_format=torch.channels_last)
    sample, timestep, text = (given.pop(name) for name in ("sample", "timestep", "encoder_hidden_states"))
    return Function(lambda: module(sample, timestep, text, added_cond_kwargs=given, return_dict=False))


def _compiled(module: Any) -> Any:
    """As diffusers recommends: channels last, CUDA graphs."""
    return torch.compile(module.to(memory_format=torch.channels_last), mode="reduce-overhead", fullgraph=True)


def _torch_pipeline(settings: Settings, dtype: torch.dtype) -> Any:
    pipe = AutoPipelineForImage2Image.from_pretrained(
        settings.weights("sd15"), torch_dtype=dtype, safety_checker=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.to(memory_format=torch.channels_last)
    return pipe.to(settings.device)


def _draw(pipeline: Pipeline, side: int, seeds: tuple[int, ...]) -> None:
    image = Image.linear_gradient("L").resize((side, side)).convert("RGB")
    Picture(pipeline, Request("", image, "a lake", None, 0.5, 4, 7.5, seeds)).run()


def _timed(section: str, cases: dict[str, Case], floor: float | None) -> list[Line]:
    """A line for each case, ours first; what ours is to be compared with is the aim."""
    lines = []
    for name, case in cases.items():
        lower, median, upper = quartiles(case.seconds)
        lines.append(Line(section, name, median * 1e3, "ms", note=f"{lower * 1e3:.2f} to {upper * 1e3:.2f}"))
    if lines:
        lines[0] = lines[0].limited(floor, 2.5 if "sd15" in section else 2.0)
    compiled = next((line for line in lines if line.name == "torch.compile"), None)
    if compiled is not None and lines[0].name == "ours":
        lines.append(Line(section, "torch.compile over ours", (compiled.value or 0) / (lines[0].value or 1), "x").at_least(1.0))
    return lines


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
