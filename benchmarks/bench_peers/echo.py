"""A bare echo: a grpc.aio service that returns the file of a request, to measure what a server adds to gRPC."""

import argparse
import asyncio
from pathlib import Path
from typing import Any

from img2img.v1.image_to_image_pb2 import ImageResult, TransformRequest, TransformResponse

from bench_peers.common import TransformOnly, serve_until_stopped


class _Echo(TransformOnly):
    async def Transform(self, request: TransformRequest, context: Any) -> TransformResponse:
        """Returns the request's file."""
        return TransformResponse(images=[ImageResult(data=request.image.data)])


def _main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--port-file", type=Path, required=True, metavar="FILE", help="write the port to this file once ready")
    asyncio.run(serve_until_stopped(_Echo(), flags.parse_args().port_file))


if __name__ == "__main__":
    _main()
