"""Peer (a): optimum's ORTPipelineForImage2Image behind an asyncio.Lock, the most common way to serve an ONNX pipeline."""

import asyncio
import time

from bench_peers.common import Arguments, Device, Made, load_optimum, parser, prepare_process, serve


class Locked:
    """Runs one request at a time, in order of arrival."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._lock = asyncio.Lock()

    async def run(self, arguments: Arguments) -> Made:
        """Waits for the lock and runs the pipeline."""
        arrived = time.perf_counter()
        async with self._lock:
            begun = time.perf_counter()
            (image,) = await self._device.make([arguments])
            return Made(image, begun - arrived, time.perf_counter() - begun)


async def _main() -> None:
    arguments = parser(__doc__).parse_args()
    device = Device(lambda: load_optimum(arguments.model))
    await serve(device, Locked(device), "optimum:lock", arguments.port_file)


if __name__ == "__main__":
    prepare_process()
    asyncio.run(_main())
