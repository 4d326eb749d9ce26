"""A bare echo: a grpc.aio service that returns the file of a request, to measure what a server adds to gRPC."""

import argparse
import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
from img2img.v1.image_to_image_pb2 import (
    ImageResult,
    TransformBatchResponse,
    TransformRequest,
    TransformResponse,
    TransformStreamRequest,
    TransformStreamResponse,
)
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceServicer, add_ImageToImageServiceServicer_to_server

from bench_peers.common import OPTIONS


class _Echo(ImageToImageServiceServicer):
    async def Transform(self, request: TransformRequest, context: Any) -> TransformResponse:
        """Returns the request's file."""
        return TransformResponse(images=[ImageResult(data=request.image.data)])

    async def TransformStream(self, request: TransformStreamRequest, context: Any) -> AsyncIterator[TransformStreamResponse]:
        """Not implemented."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "use Transform")
        yield TransformStreamResponse()

    async def TransformBatch(self, requests: Any, context: Any) -> AsyncIterator[TransformBatchResponse]:
        """Not implemented."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "use Transform")
        yield TransformBatchResponse()


async def _main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--port-file", type=Path, required=True, metavar="FILE", help="write the port to this file once ready")
    port_file: Path = flags.parse_args().port_file
    server = grpc.aio.server(options=OPTIONS)
    add_ImageToImageServiceServicer_to_server(_Echo(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    partial = port_file.with_suffix(".partial")
    partial.write_text(f"{port}\n")
    partial.replace(port_file)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_main())
