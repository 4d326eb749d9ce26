"""`img2img serve`: flags -> frozen config -> run."""

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from img2img_server.config import ServerConfig
    from img2img_server.execution import Bucket, Execution
    from img2img_server.pipelines.tensorrt_contender import Shelf
    from img2img_server.takeover import Contender

_EPILOG = """\
examples:
  img2img serve --models models                 every bundle in the folder, on 127.0.0.1:50051
  img2img serve --models models/sdxl --port 0   one bundle, on a free port

The server answers health checks (grpc.health.v1) and reflection. SIGTERM drains it: new requests are refused, running ones
finish within --grace seconds. There is no TLS and no login yet: keep it on loopback or behind something that has them.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `img2img serve`."""
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--models", type=Path, required=True, metavar="DIR", help="a folder of bundles, or one bundle")
    add("--default-model", metavar="ID", help="the model of requests that name none (default: the only one there is)")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=50051, help="port to listen on, 0 for a free one (default: %(default)s)")
    add("--port-file", type=Path, metavar="FILE", help="write the port here once the server is ready")
    add("--grace", type=float, default=30.0, metavar="SECONDS", help="time to finish on SIGTERM (default: %(default)s)")
    add(
        "--max-batch-size",
        type=int,
        default=16,
        metavar="N",
        help="most rows of a model call, two a guided picture (default: 16)",
    )
    add("--warm-up", type=float, default=10.0, metavar="SECONDS", help="time to measure a model at start (default: %(default)s)")
    add("--cache-bytes", type=int, default=256 * 2**20, metavar="N", help="memory for encoded prompts and pictures (256 MiB)")
    add("--trace", type=Path, metavar="FILE", help="write the device's timeline here, to be opened in ui.perfetto.dev")
    add("--allow-unverified", action="store_true", help="also serve bundles that did not pass their export's verification")
    add("--max-waiting", type=int, default=256, metavar="N", help="requests that may wait (default: %(default)s)")
    add("--max-steps", type=int, default=100, metavar="N", help="largest num_inference_steps (default: %(default)s)")
    add("--max-image-bytes", type=int, default=16 * 2**20, metavar="N", help="largest source file (default: 16 MiB)")
    add("--max-pixels", type=int, default=2048 * 2048, metavar="N", help="largest result, width x height (default: 2048 x 2048)")
    _configure_execution(parser.add_argument_group("how models are run"))


def _configure_execution(group: argparse._ArgumentGroup) -> None:
    """Declares the flags that become an Execution."""
    from img2img_server.execution import PROVIDERS

    add = group.add_argument
    add(
        "--provider",
        choices=("auto", *PROVIDERS),
        default="auto",
        help="what runs ONNX graphs. auto: the first of these that works here; the log says why not a better one. One that is "
        "asked for by name and does not work is an error at start",
    )
    add(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads of one model call (default: one for each physical core that this process may use)",
    )
    add(
        "--arithmetic",
        choices=("auto", "fp32"),
        default="auto",
        help="auto: compute in bfloat16 or float16 where that is faster and the model's reference pictures still pass. "
        "fp32: in no less than the bundle's own precision",
    )
    add(
        "--buckets",
        type=_buckets,
        metavar="WxH:ROWS[,...]",
        help="common sizes to prepare for, in pixels, with the rows of a call: 512x512:2 is one guided picture of 512 x 512. "
        "Each costs memory; other sizes run slower (default: the model's own size with 2 rows; none: no such preparation)",
    )
    add(
        "--gpu-memory",
        type=int,
        metavar="BYTES",
        help="most GPU memory that each of ONNX Runtime's sessions keeps (default: no bound)",
    )
    add(
        "--no-cuda-graphs",
        action="store_true",
        help="start each GPU kernel anew instead of replaying recorded calls of common sizes",
    )
    add("--compile", action="store_true", help="torch.compile what runs in PyTorch: minutes more at start, faster steps")
    add(
        "--engine-cache",
        type=Path,
        metavar="DIR",
        help="where built TensorRT engines are kept (default: ~/.cache/img2img/engines)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serves until a signal. Returns 0 after a drain, 1 where it could not start, 2 for a setting that cannot work."""
    # Read at import by libraries that would report on their own imports.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Read by OpenMP when torch is loaded: threads that spin while they wait take cores from those that work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from img2img_server.config import ServerConfig
    from img2img_server.engine.scheduler import Limits
    from img2img_server.images import ImageLimits

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    try:
        config = ServerConfig(
            models=arguments.models,
            host=arguments.host,
            port=arguments.port,
            port_file=arguments.port_file,
            default_model=arguments.default_model,
            execution=_execution(arguments),
            grace=arguments.grace,
            max_steps=arguments.max_steps,
            cache_bytes=arguments.cache_bytes,
            warm_up=arguments.warm_up,
            trace=arguments.trace,
            allow_unverified=arguments.allow_unverified,
            limits=Limits(max_batch_size=arguments.max_batch_size, max_waiting=arguments.max_waiting),
            image_limits=ImageLimits(max_bytes=arguments.max_image_bytes, max_pixels=arguments.max_pixels),
        )
    except ValueError as error:
        print(f"img2img serve: {error}", file=sys.stderr)
        return 2
    return asyncio.run(_serve(config))


def _buckets(text: str) -> "tuple[Bucket, ...]":
    from img2img_server.execution import Bucket

    try:
        return () if text == "none" else tuple(map(Bucket.parse, text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _execution(arguments: argparse.Namespace) -> "Execution":
    from img2img_server.execution import Execution

    return Execution(
        provider=arguments.provider,
        threads=arguments.threads,
        arithmetic=arguments.arithmetic,
        buckets=arguments.buckets,
        gpu_memory=arguments.gpu_memory,
        cuda_graphs=not arguments.no_cuda_graphs,
        compile=arguments.compile,
        cache=arguments.engine_cache,
    )


async def _serve(config: "ServerConfig") -> int:
    from img2img_server.engine.cache import Cache
    from img2img_server.errors import BundleError
    from img2img_server.models import ModelStore
    from img2img_server.server import Server

    cache = Cache(config.cache_bytes)
    shelf: Shelf | None = None

    def load_models() -> ModelStore:
        from img2img_server.pipelines import providers

        # Before the loader's imports, which take seconds.
        providers.check(config.execution.provider)
        from img2img_server.pipelines.loader import load_pipeline
        from img2img_server.pipelines.tensorrt_contender import Shelf

        nonlocal shelf
        kept = shelf = Shelf()
        return ModelStore.load(
            config.models,
            lambda bundle, manifest: load_pipeline(bundle, manifest, config.execution, cache, keep=kept.keep),
            config.default_model,
            config.allow_unverified,
        )

    def contend(models: ModelStore) -> "Sequence[Contender]":
        from img2img_server.pipelines.tensorrt_contender import contenders

        assert shelf is not None, "the models were loaded"
        return contenders(models, config.execution, cache, shelf)

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = Server(config, load_models, cache, contend)
    try:
        await server.start()
    except (BundleError, OSError) as error:
        print(f"img2img serve: {error}", file=sys.stderr)
        return 1
    await stop.wait()
    logging.getLogger(__name__).info("draining")
    await server.stop()
    return 0


if __name__ == "__main__":
    from img2img_cli.__main__ import main

    sys.exit(main(["serve", *sys.argv[1:]]))
