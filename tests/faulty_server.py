"""The process of a server whose model is a fake with a fault: python tests/faulty_server.py FAULT [flags of `img2img serve`].

FAULT is "none", for a model that works, "call", for a call of the model that never returns, "loading", for a model that is never
loaded, or "end", for an event loop that is blocked when the server is to stop at once. Standard output gets the word once it
happens.
"""

import argparse
import asyncio
import sys
import threading

from fakes import FakePipeline
from img2img_server.__main__ import configure, configured
from img2img_server.api.lifecycle import live
from img2img_server.api.server import Server
from img2img_server.backends.local import LocalBackend
from img2img_server.models.registry import ModelRegistry
from img2img_server.telemetry import logs
from running import store


def main() -> int:
    """Serves, and returns the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("fault", choices=("none", "call", "loading", "end"))
    configure(parser)
    arguments = parser.parse_args()
    config = configured(arguments, {}).config
    logs.configure("text")
    never = threading.Event()

    def hang() -> None:
        print(arguments.fault, flush=True)
        never.wait()

    def load_models() -> ModelRegistry:
        if arguments.fault == "loading":
            hang()
        pipeline = FakePipeline()
        if arguments.fault != "none":
            pipeline.before_call = hang
        return store(m=pipeline)

    class Faulty(Server):
        async def stop_now(self) -> None:
            if arguments.fault == "end":
                hang()
            await super().stop_now()

    return asyncio.run(live(Faulty(config, LocalBackend(config, load_models))))


if __name__ == "__main__":
    sys.exit(main())
