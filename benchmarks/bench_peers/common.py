"""Code shared by the peers: conversion of messages to a pipeline's arguments and back, and the server process.

A peer implements ImageToImageService.Transform for one model and one image per request, with plain grpc.aio. Its pipeline is
called in one worker thread, so the event loop stays free and torch keeps one pool of OpenMP threads.
"""

import argparse
import asyncio
import inspect
import io
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc
from img2img.v1.image_to_image_pb2 import (
    ImageResult,
    OutputFormat,
    Timings,
    TransformBatchResponse,
    TransformRequest,
    TransformResponse,
    TransformStreamRequest,
    TransformStreamResponse,
)
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceServicer, add_ImageToImageServiceServicer_to_server
from PIL import Image

DEFAULT_PROMPT = "A beautiful landscape with mountains and a lake at sunset"
MESSAGE_BYTES = 64 * 2**20
OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
)


@dataclass(frozen=True, slots=True)
class Arguments:
    """The arguments of a pipeline call for one request, with the contract's defaults."""

    prompt: str
    negative_prompt: str | None
    image: Image.Image
    strength: float
    num_inference_steps: int
    guidance_scale: float
    seed: int


@dataclass(frozen=True, slots=True)
class Made:
    """An image, and the seconds that its request waited for the pipeline and ran in it."""

    image: Image.Image
    waited: float
    ran: float


class Runner(Protocol):
    """Schedules requests on a pipeline."""

    async def run(self, arguments: Arguments) -> Made:
        """Makes one image."""
        ...


class Device:
    """A diffusers pipeline and the thread that calls it. Callers must make one call at a time."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load
        self._pipeline: Any = None
        self._thread = ThreadPoolExecutor(1, "pipeline")

    async def start(self) -> None:
        """Loads the pipeline and warms it up with an image."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self.load)

    async def make(self, batch: Sequence[Arguments]) -> list[Image.Image]:
        """Makes one pipeline call for requests that differ only in prompts, images and seeds."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.make_now, batch)

    def load(self) -> None:
        """The same as `start`, on the calling thread, which then calls `make_now`."""
        self._pipeline = self._load()
        self._pipeline.set_progress_bar_config(disable=True)
        for guidance_scale in (7.5, 1.0):
            self.make_now([Arguments(DEFAULT_PROMPT, None, Image.new("RGB", (64, 64)), 1.0, 2, guidance_scale, 0)])

    def make_now(self, batch: Sequence[Arguments]) -> list[Image.Image]:
        """The same as `make`, on the calling thread."""
        import torch

        first = batch[0]
        known = inspect.signature(self._pipeline.__call__).parameters
        arguments = {
            "prompt": [each.prompt for each in batch],
            "negative_prompt": None if first.negative_prompt is None else [each.negative_prompt for each in batch],
            "image": [each.image for each in batch],
            "strength": first.strength,
            "num_inference_steps": first.num_inference_steps,
            "guidance_scale": first.guidance_scale,
            "generator": [torch.Generator().manual_seed(each.seed) for each in batch],
            # Otherwise some classes make images of their own size.
            **({"height": first.image.height, "width": first.image.width} if "height" in known else {}),
        }
        images: list[Image.Image] = self._pipeline(**{name: value for name, value in arguments.items() if name in known}).images
        return images


class TransformOnly(ImageToImageServiceServicer):
    """A service whose subclasses implement Transform: benchmarks send single requests."""

    async def TransformStream(self, request: TransformStreamRequest, context: Any) -> AsyncIterator[TransformStreamResponse]:
        """Not implemented."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "use Transform")
        yield TransformStreamResponse()

    async def TransformBatch(self, requests: Any, context: Any) -> AsyncIterator[TransformBatchResponse]:
        """Not implemented."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "use Transform")
        yield TransformBatchResponse()


class _Service(TransformOnly):
    def __init__(self, runner: Runner, engine: str) -> None:
        self._runner = runner
        self._engine = engine

    async def Transform(self, request: TransformRequest, context: Any) -> TransformResponse:
        """Decodes, runs the pipeline and encodes. Codecs run in threads."""
        begun = time.perf_counter()
        arguments = await asyncio.to_thread(read, request)
        decoded = time.perf_counter()
        made = await self._runner.run(arguments)
        data = await asyncio.to_thread(encode, made.image)
        timings = Timings(
            queue_ms=made.waited * 1e3,
            encode_ms=(decoded - begun) * 1e3,
            denoise_ms=made.ran * 1e3,
            total_ms=(time.perf_counter() - begun) * 1e3,
        )
        result = ImageResult(data=data, format=OutputFormat.OUTPUT_FORMAT_PNG, seed=arguments.seed)
        result.width, result.height = made.image.size
        return TransformResponse(images=[result], engine=self._engine, timings=timings)


def read(request: TransformRequest) -> Arguments:
    """The contract's message as a pipeline's arguments. A seed of -1 is used as it is: the benchmark always sets a seed."""
    image = Image.open(io.BytesIO(request.image.data)).convert("RGB")
    return Arguments(
        prompt=request.prompt if request.HasField("prompt") else DEFAULT_PROMPT,
        negative_prompt=request.negative_prompt or None,
        image=image,
        strength=request.strength if request.HasField("strength") else 0.8,
        num_inference_steps=request.num_inference_steps if request.HasField("num_inference_steps") else 25,
        guidance_scale=request.guidance_scale if request.HasField("guidance_scale") else 7.5,
        seed=request.seed,
    )


def encode(image: Image.Image) -> bytes:
    """The image as a PNG file, with the server's compression level."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the flags of every peer."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--model", type=Path, required=True, metavar="DIR", help="model to load")
    made.add_argument("--port-file", type=Path, required=True, metavar="FILE", help="write the port to this file once ready")
    return made


def prepare_process() -> None:
    """Sets environment variables as `img2img serve` does. Call it before torch is imported."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def load_optimum(model: Path) -> Any:
    """Optimum's image-to-image pipeline on a bundle, with its default provider and thread count.

    torch only computes the scheduler here, which is slower with more than one thread.
    """
    import torch
    from optimum.onnxruntime import ORTPipelineForImage2Image

    torch.set_num_threads(1)
    return ORTPipelineForImage2Image.from_pretrained(str(model), export=False)


def load_pytorch(model: Path, in_bfloat16: bool = False) -> Any:
    """diffusers' image-to-image pipeline in PyTorch on all cores, in float32 or in bfloat16."""
    import torch
    from diffusers import AutoPipelineForImage2Image

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    dtype = torch.bfloat16 if in_bfloat16 else torch.float32
    return AutoPipelineForImage2Image.from_pretrained(str(model), torch_dtype=dtype)


async def serve(device: Device, runner: Runner, engine: str, port_file: Path) -> None:
    """Serves on a free loopback port until SIGTERM; writes `port_file` once the pipeline is warm."""
    await device.start()
    await serve_until_stopped(_Service(runner, engine), port_file)


async def serve_until_stopped(service: ImageToImageServiceServicer, port_file: Path) -> None:
    """Serves on a free loopback port until SIGTERM or SIGINT, and writes the port to `port_file`."""
    server = grpc.aio.server(options=OPTIONS)
    add_ImageToImageServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    write_port(port, port_file)
    await stop.wait()
    await server.stop(1)


def write_port(port: int, port_file: Path) -> None:
    """Writes the port to `port_file`, which never exists in part."""
    partial = port_file.with_suffix(".partial")
    partial.write_text(f"{port}\n")
    partial.replace(port_file)
