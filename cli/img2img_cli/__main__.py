"""`img2img COMMAND ...`: finds the command's module and hands over.

A command's module offers `configure(parser)`, which declares its flags, and `run(arguments) -> int`, which does the work
and returns the exit status. Only the module of the command that was asked for is imported, so `img2img --help` is quick.
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
    "export": ("img2img_export.cli.export", "turn a diffusers model into a verified bundle"),
    "inspect": ("img2img_export.cli.inspect", "show what a bundle is, and what was measured when it was verified"),
    "serve": ("img2img_server.__main__", "serve bundles over gRPC"),
    "token": ("img2img_server.access.command", "make, list and remove the tokens of those who may call a server"),
    "top": ("img2img_server.tools.top.command", "watch what a server is doing"),
    "bench-model": ("img2img_server.tools.bench_model.command", "measure a bundle's parts and steps on this machine"),
    "transform": ("img2img_client.transform_command", "transform a picture through a server"),
    "reproduce": ("img2img_client.reproduce_command", "send the request that made an image again, and compare the images"),
    "models": ("img2img_client.models_command", "list a server's models"),
    "health": ("img2img_client.health_command", "ask whether a server serves, or wait until it does"),
    "playground": ("img2img_playground.command", "try a server in the browser: a local page with previews and comparison"),
    "assets": ("img2img_client.assets_command", "have a server keep pictures, get them back, delete them"),
}

_EXTRAS = {"export": "export", "serve": "server", "bench-model": "server", "playground": "playground"}

_EPILOG = """\
first steps:
  img2img export ./my-model --output models/my-model
  img2img inspect models/my-model
  img2img serve --models models
  img2img transform photo.jpg --prompt "the same place in winter" --output winter.png

`img2img COMMAND --help` explains a command.
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
        # Who read the output has gone, as `head` does. The interpreter would try again to write the rest when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        # A disk that is full, or a path that is missing or may not be written, which the command itself did not report.
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
    """One line about an error that no command expects, to be put after its name."""
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
            parser.error(f"there is no command '{command}'{meant(command, COMMANDS)} (commands: {', '.join(COMMANDS)})")
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
    """argparse's "version", but the version is looked up only if it is asked for: that takes longer than all of `--help`."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        """Prints the version and exits with status 0."""
        print(f"img2img {distribution.version()}")
        parser.exit()


def _described(error: OSError) -> str:
    """What went wrong with which file, in a line."""
    if error.errno is None:
        return str(error)
    name = f"{error.filename}: " if error.filename else ""
    return f"{name}{error.strerror}"


if __name__ == "__main__":
    sys.exit(main())
