"""`img2img serve` with a simulated device, to test and measure engines on Ray and in the process.

Its arguments are JSON objects: settings of ServerConfig, RaySettings and the device; and --port-file, as in `img2img serve`.
"""

import argparse
import asyncio
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from img2img_server.api.lifecycle import live
from img2img_server.api.server import Server
from img2img_server.backends.local import LocalBackend
from img2img_server.backends.ray.backend import ClusterBackend, RayConnection
from img2img_server.config import RaySettings, ServerConfig
from img2img_server.telemetry import logs
from simulated_device import SOMEWHERE, simulated


def server(settings: dict[str, Any], ray: dict[str, Any], device: dict[str, Any]) -> Server:
    """The server with these settings: a front if `engine` is "ray", otherwise one with its own engine."""
    if "port_file" in settings:
        settings["port_file"] = Path(settings["port_file"])
    config = ServerConfig(SOMEWHERE, port=0, warm_up=0.0, ray=RaySettings(**ray), **settings)
    make: Callable[[ServerConfig], LocalBackend] = functools.partial(simulated, **device)
    if config.engine == "local":
        return Server(config, make(config))
    return Server(config, ClusterBackend(config, RayConnection(config, make)))


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("parts", type=json.loads, nargs=3, metavar="JSON")
    flags.add_argument("--port-file", metavar="FILE")
    given = flags.parse_args()
    settings, *others = given.parts
    if given.port_file:
        settings["port_file"] = given.port_file
    logs.configure("text")
    sys.exit(asyncio.run(live(server(settings, *others))))
