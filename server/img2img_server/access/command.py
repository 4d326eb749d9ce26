"""`img2img token`: creates, lists and removes the tokens that authorize callers of a server."""

import argparse
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

VARIABLE = "IMG2IMG_TOKENS"

_EPILOG = """\
examples:
  img2img token add alice --tokens tokens.toml
  img2img token add batch --tokens tokens.toml --models 'sdxl*' --requests-per-minute 60 --concurrency 4
  img2img token add ci --tokens tokens.toml --expires 2027-01-31 --admin
  img2img token list --tokens tokens.toml
  img2img token remove alice --tokens tokens.toml

`img2img serve --tokens tokens.toml` accepts calls with one of these tokens. It reloads the file when it changes:
added and removed tokens take effect within a second or two. Running calls continue.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `img2img token`."""
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    add = _action(actions, "add", "create a token and print it; it cannot be shown again, since the file stores only its hash")
    add.add_argument("name", metavar="NAME", help="name of the client, shown in logs and metrics")
    add.add_argument(
        "--models", nargs="+", metavar="PATTERN", help="ids of the models that the token may use, such as sdxl* (default: all)"
    )
    add.add_argument("--requests-per-minute", type=int, metavar="N", help="maximum calls per minute (default: no limit)")
    add.add_argument("--concurrency", type=int, metavar="N", help="maximum calls in progress (default: no limit)")
    add.add_argument("--admin", action="store_true", help="allow the token to load and unload models")
    add.add_argument(
        "--expires", metavar="DATE", help="time of expiry in UTC: 2027-01-31, or 2027-01-31T18:00:00Z (default: never)"
    )
    _action(actions, "list", "list the tokens' names and permissions")
    remove = _action(actions, "remove", "remove a token")
    remove.add_argument("name", metavar="NAME", help="name of the token to remove")


def run(arguments: argparse.Namespace) -> int:
    """Runs the action. Returns 0, 1 if the file cannot be used, 2 for wrong arguments."""
    path = arguments.tokens or os.environ.get(VARIABLE)
    if not path:
        return _failed(f"the token file is not set: give --tokens FILE or set {VARIABLE}", 2)
    actions = {"add": _add, "list": _list, "remove": _remove}
    try:
        return actions[arguments.action](Path(path), arguments)
    except OSError as error:
        return _failed(f"{path} cannot be used: {error.strerror}", 1)
    except ValueError as error:
        return _failed(str(error), 1)


def _add(path: Path, arguments: argparse.Namespace) -> int:
    from img2img_server.access import tokens

    secret = tokens.make_secret()
    try:
        token = tokens.Token(
            tokens.check_name(arguments.name),
            tokens.digest(secret),
            None if arguments.models is None else tokens.check_patterns(arguments.models),
            arguments.requests_per_minute,
            arguments.concurrency,
            arguments.admin,
            None if arguments.expires is None else tokens.parse_expiry(arguments.expires),
        )
        for flag in ("requests_per_minute", "concurrency"):
            if (value := getattr(token, flag)) is not None and value < 1:
                raise ValueError(f"--{flag.replace('_', '-')} is {value}, the minimum is 1")
    except ValueError as error:
        return _failed(str(error), 2)
    with tokens.editing(path) as known:
        if token.name in known:
            raise ValueError(f"{path} already has a token '{token.name}': remove it first, or choose another name")
        known[token.name] = token
    print(secret)
    print(f"Token of '{token.name}'. It cannot be shown again: {path} stores only its hash.", file=sys.stderr)
    return 0


def _list(path: Path, arguments: argparse.Namespace) -> int:
    from img2img_server.access import tokens

    now = datetime.now(UTC)
    rows = [("NAME", "MODELS", "PER MINUTE", "CONCURRENCY", "ADMIN", "EXPIRES")]
    for token in tokens.read(path).values():
        expires = "never" if token.expires is None else token.expires.isoformat()
        expired = token.expires is not None and token.expires <= now
        rows.append(
            (
                token.name,
                "all" if token.models is None else " ".join(token.models),
                str(token.requests_per_minute or "any"),
                str(token.concurrency or "any"),
                "yes" if token.admin else "no",
                f"{expires} (expired)" if expired else expires,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _remove(path: Path, arguments: argparse.Namespace) -> int:
    from img2img_server.access import tokens

    tokens.read(path)  # fails if the file does not exist, instead of creating it
    with tokens.editing(path) as known:
        if known.pop(arguments.name, None) is None:
            raise ValueError(f"{path} has no token '{arguments.name}'; it has {', '.join(known) or 'none'}")
    print(f"Removed token '{arguments.name}'.", file=sys.stderr)
    return 0


def _action(actions: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, summary: str) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    parser.add_argument("--tokens", metavar="FILE", help=f"token file (default: {VARIABLE})")
    return parser


def _failed(why: str, status: int) -> int:
    print(f"img2img token: {why}", file=sys.stderr)
    return status
