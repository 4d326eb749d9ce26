"""`img2img health`: whether a server serves, for probes of containers and for scripts that wait for one."""

import argparse

from img2img_client.connection import add_connection_flags, connect, target_of
from img2img_client.reporting import attempt

PROGRAM = "img2img health"

_EPILOG = """\
examples:
  img2img health                                     is it serving?
  img2img health --timeout 600                       wait until it is
  img2img health --target https://gpu-box:50051 --ca ca.pem

exit status: 0 it serves; 1 it did not within --timeout seconds, or could not be reached; 2 arguments that cannot work. No
token is needed.
"""

_SECONDS = 3.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_connection_flags(parser, patience=f"{_SECONDS:g}")


def run(arguments: argparse.Namespace) -> int:
    """Watches the server's health (grpc.health.v1). Returns 0 when it is SERVING, 1 where it is not in time, 2 for arguments that
    cannot work. Prints nothing where all is well."""

    def work() -> None:
        with connect(arguments) as client:
            client.wait_until_ready(_SECONDS if arguments.timeout is None else arguments.timeout)

    return attempt(PROGRAM, target_of(arguments), work)
