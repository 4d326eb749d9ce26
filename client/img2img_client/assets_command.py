"""`img2img assets`: images that the server keeps, sent once and used as often as one likes."""

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
    """Declares the flags."""
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    upload = actions.add_parser("upload", help="have the server keep a picture; prints its address")
    upload.add_argument("file", metavar="FILE", help="the picture's file, - for standard input")
    upload.add_argument("--json", action="store_true", help="print all that the server says of it as JSON")
    download = actions.add_parser("download", help="get a picture's file")
    download.add_argument("--output", metavar="OUT", required=True, help="where to write; - for standard output")
    delete = actions.add_parser("delete", help="have the server forget a picture")
    for action in (download, delete):
        action.add_argument("asset", metavar="ID", help="the id, with or without asset:")
    for action in (upload, download, delete):
        add_connection_flags(action)


def run(arguments: argparse.Namespace) -> int:
    """Does it. Returns 0, 1 for a failure, 2 for arguments that cannot work."""

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
    expires = "" if asset.expire_time is None else f", kept until {asset.expire_time:%Y-%m-%d %H:%M} UTC unless it is used"
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
