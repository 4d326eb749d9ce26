"""Peer (c): diffusers' AutoPipelineForImage2Image on PyTorch, on all cores in fp32, behind an asyncio.Lock."""

import asyncio

from bench_peers.common import Device, load_pytorch, parser, prepare_process, serve
from bench_peers.lock import Locked


async def _main() -> None:
    arguments = parser(__doc__).parse_args()
    device = Device(lambda: load_pytorch(arguments.model))
    await serve(device, Locked(device), "pytorch:lock", arguments.port_file)


if __name__ == "__main__":
    prepare_process()
    asyncio.run(_main())
