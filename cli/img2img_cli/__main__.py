"""`img2img COMMAND ...`: runs the command's module.

The module has `configure(parser)`, which adds its flags, and `run(arguments) -> int`, which does the work and returns the exit
status. Only the module of the given command is imported, so `img2img --help` is fast.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from img2img_server.support import distribution

from img2img_cli.suggestions import Parser, meant, warn_of_variables

COMMANDS = {
    "export": ("img2img_export.cli.export", "convert a diffusers model into a verified bundle"),
    "inspect": ("img2img_export.cli.inspect", "show a bundle's contents and verification results"),
    "serve": ("img2img_server.__main__", "serve bundles over gRPC"),
    "token": ("img2img_server.access.command", "create, list and revoke access tokens"),
    "top": ("img2img_server.tools.top", "monitor a server in the terminal"),
    "bench-model": ("img2img_server.tools.bench_model", "benchmark a bundle's parts and steps on this machine"),
    "transform": ("img2img_client.transform_command", "transform an image with a server"),
    "reproduce": ("img2img_client.reproduce_command", "repeat a recorded request, and compare the images"),
    "models": ("img2img_client.models_command", "list, load and unload a server's models"),
    "health": ("img2img_client.health_command", "check whether a server is ready, or wait until it is"),
    "playground": ("img2img_playground.command", "open a local web page to try a server, with previews and comparison"),
    "assets": ("img2img_client.assets_command", "upload, download and delete images stored on a server"),
}

_EXTRAS = {"export": "export", "serve": "server", "bench-model": "server", "playground": "playground"}

_EPILOG = """\
first steps:
  img2img export ./my-model --output models/my-model
  img2img inspect models/my-model
  img2img serve --models models
  img2img transform photo.jpg --prompt "the same place in winter" --output winter.png

`img2img COMMAND --help` shows the options of a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns its exit status: 0 done, 1 failed, 2 wrong arguments, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words[0] if words else ""
    try:
        status = _run(command, words)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader closed the pipe, like `head` does. Otherwise the interpreter would try to write the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        # A full disk, or a path that is missing or not writable, that the command itself did not report.
        print(f"img2img {command}: {_described(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if "--verbose" in words:
            raise
        print(f"img2img {command}{_explain(error, command)}", file=sys.stderr)
        return 1


def _explain(error: Exception, command: str) -> str:
    """One line for an unexpected error, to follow the command's name."""
    if isinstance(error, ModuleNotFoundError) and command in _EXTRAS and not (error.name or "").startswith("img2img"):
        return f" needs '{error.name}': {distribution.install_hint(_EXTRAS[command])}"
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return f": unexpected {type(error).__name__}: {first} (--verbose shows the traceback)"


def _run(command: str, words: Sequence[str]) -> int:
    module = importlib.import_module(COMMANDS[command][0]) if command in COMMANDS else None
    parser = Parser(
        prog="img2img",
        description="An optimized image-to-image inference server.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show program's version number and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    subparser = None
    for name, (_, summary) in COMMANDS.items():
        one = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if module is not None and name == command:
            module.configure(one)
            one.add_argument("--verbose", action="store_true", help="show the traceback of an unexpected error")
            subparser = one
    if not words:
        parser.print_help()
        return 0
    if module is None or subparser is None:
        if not command.startswith("-"):
            parser.error(f"unknown command '{command}'{meant(command, COMMANDS)} (commands: {', '.join(COMMANDS)})")
        parser.check_flags(words)
        parser.parse_args(words)
        raise AssertionError("argparse refuses unknown commands")
    if words == [command] and subparser.has_commands:
        subparser.print_help()
        return 0
    subparser.check_flags(words[1:])
    arguments = parser.parse_args(words)
    if command != "serve":
        warn_of_variables(os.environ)
    return int(module.run(arguments))


class _ShowVersion(argparse.Action):
    """Like argparse's "version", but looks up the version only on request: the look-up takes longer than all of `--help`."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        """Prints the version and exits with status 0."""
        print(f"img2img {distribution.version()}")
        parser.exit()


def _described(error: OSError) -> str:
    """The error and its file, in one line."""
    if error.errno is None:
        return str(error)
    name = f"{error.filename}: " if error.filename else ""
    return f"{name}{error.strerror}"


if __name__ == "__main__":
    sys.exit(main())
