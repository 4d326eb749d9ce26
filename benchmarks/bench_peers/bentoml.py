"""Peer (e): BentoML around diffusers' pipeline, with adaptive batching."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import bentoml  # type: ignore[import-not-found]

from bench_peers.common import parser, prepare_process
from bench_peers.whole_requests import MAX_BATCH, BatchPipeline, announce_later, child_environment, free_port

_LONGEST_MS = 600_000
"""BentoML refuses requests that it expects to take longer than this; the load client waits for all."""


@bentoml.service(workers=1, traffic={"timeout": _LONGEST_MS / 1000})
class Service:
    """Makes images of TransformRequests, each in base64."""

    def __init__(self) -> None:
        self._pipeline = BatchPipeline(Path(os.environ["IMG2IMG_BENCH_MODEL"]))

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=_LONGEST_MS)  # type: ignore[untyped-decorator]
    def transform(self, messages: list[str]) -> list[str]:
        """The images' files, in base64."""
        return self._pipeline.make(messages)


def _main() -> None:
    arguments: Any = parser(__doc__).parse_args()
    port = free_port()
    announce_later("/readyz", port, arguments.port_file)
    words = ["-m", "bentoml", "serve", "bench_peers.bentoml:Service", "--host", "127.0.0.1", "--port", str(port), "--quiet"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that the block below ends the server's processes
    process = subprocess.Popen([sys.executable, *words], env=child_environment(arguments.model))
    try:
        process.wait()
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    prepare_process()
    _main()
