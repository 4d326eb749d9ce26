"""Peer (c): diffusers' AutoPipelineForImage2Image on PyTorch, on all cores in fp32, behind an asyncio.Lock."""

import asyncio
import os
from pathlib import Path
from typing import Any

from bench_peers.common import Device, parser, prepare_process, serve
from bench_peers.lock import Locked


def _load(model: Path) -> Any:
    import torch
    from diffusers import AutoPipelineForImage2Image

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return AutoPipelineForImage2Image.from_pretrained(str(model), torch_dtype=torch.float32)


async def _main() -> None:
    arguments = parser(__doc__).parse_args()
    device = Device(lambda: _load(arguments.model))
    await serve(device, Locked(device), "pytorch:lock", arguments.port_file)


if __name__ == "__main__":
    prepare_process()
    asyncio.run(_main())
