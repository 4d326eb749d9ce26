"""`img2img assets`: images stored on the server, uploaded once and used any number of times."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from img2img_client.connection import add_connection_flags, connect, target_of
from img2img_client.reporting import attempt

if TYPE_CHECKING:
    from img2img_client.client import Client

PROGRAM = "img2img assets"

_EPILOG = """\
examples:
  img2img assets upload photo.jpg
  img2img transform asset:ID --output winter.png --prompt "the same place in winter"
  img2img assets download ID --output photo.jpg
  img2img assets delete ID
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags to `parser`."""
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    upload = actions.add_parser("upload", help="store an image on the server, and print its address")
    upload.add_argument("file", metavar="FILE", help="the image file, - for standard input")
    upload.add_argument("--json", action="store_true", help="print all fields of the asset as JSON")
    download = actions.add_parser("download", help="download a stored image")
    download.add_argument("--output", metavar="OUT", required=True, help="output file; - for standard output")
    delete = actions.add_parser("delete", help="delete a stored image")
    for action in (download, delete):
        action.add_argument("asset", metavar="ID", help="the id, with or without asset:")
    for action in (upload, download, delete):
        add_connection_flags(action)


def run(arguments: argparse.Namespace) -> int:
    """Runs the action. Returns 0, 1 for a failure, or 2 for invalid arguments."""

    def work() -> None:
        with connect(arguments) as client:
            _ACTIONS[arguments.action](client, arguments)

    return attempt(PROGRAM, target_of(arguments), work)


def _upload(client: "Client", arguments: argparse.Namespace) -> None:
    asset = client.upload(sys.stdin.buffer.read() if arguments.file == "-" else Path(arguments.file))
    if arguments.json:
        print(json.dumps(asdict(asset), default=str))
        return
    print(asset.uri)
    expires = "" if asset.expire_time is None else f", expires {asset.expire_time:%Y-%m-%d %H:%M} UTC unless used before"
    print(f"{asset.media_type}, {asset.size} bytes{expires}", file=sys.stderr)


def _download(client: "Client", arguments: argparse.Namespace) -> None:
    data = client.download(arguments.asset)
    if arguments.output == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        Path(arguments.output).write_bytes(data)


def _delete(client: "Client", arguments: argparse.Namespace) -> None:
    client.delete_asset(arguments.asset)


_ACTIONS = {"upload": _upload, "download": _download, "delete": _delete}
