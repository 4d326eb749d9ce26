"""`img2img health`: checks whether a server is ready, for container probes and for scripts that wait for a server."""

import argparse

from img2img_client.connection import add_connection_flags, connect, target_of
from img2img_client.reporting import attempt

PROGRAM = "img2img health"

_EPILOG = """\
examples:
  img2img health                                     check whether the server is ready
  img2img health --timeout 600                       wait until it is ready
  img2img health --target https://gpu-box:50051 --ca ca.pem

exit status: 0 ready; 1 not ready within --timeout seconds, or not reachable; 2 invalid arguments. No token is required.
"""

_SECONDS = 3.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags to `parser`."""
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_connection_flags(parser, patience=f"{_SECONDS:g}")


def run(arguments: argparse.Namespace) -> int:
    """Watches the server's health (grpc.health.v1). Returns 0 when it is SERVING, 1 if it is not in time, 2 for invalid
    arguments. Prints nothing on success."""

    def work() -> None:
        with connect(arguments) as client:
            client.wait_until_ready(_SECONDS if arguments.timeout is None else arguments.timeout)

    return attempt(PROGRAM, target_of(arguments), work)
