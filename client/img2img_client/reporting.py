"""How commands tell what went wrong: one line, and an exit status."""

import sys
from collections.abc import Callable

from img2img_client.errors import Img2ImgError, Unauthenticated, Unavailable


def complain(program: str, message: str, status: int = 1) -> int:
    """Prints one line of error and returns the exit status."""
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
    return status


def describe_error(error: Img2ImgError, server: str) -> str:
    """What went wrong in one line: the wrong fields by name, where to look, or how long to wait."""
    if error.fields:
        return "; ".join(f"{field}: {description}" for field, description in error.fields)
    if isinstance(error, Unavailable) and not error.reason:
        return f"no answer from {server}: {error.message}"
    if isinstance(error, Unauthenticated):
        return f"{error.message} (give one by --token-file or $IMG2IMG_TOKEN)"
    wait = "" if error.retry_after is None else f" (try again in {error.retry_after:.3g} s)"
    name = f" (request {error.request_id})" if error.status in _FOR_THE_OPERATOR and error.request_id else ""
    return f"{error.message}{wait}{name}"


_FOR_THE_OPERATOR = ("INTERNAL", "UNKNOWN", "DATA_LOSS")
"""Statuses whose cause is in the server's log, where the request's name finds it."""


def attempt(program: str, server: str, work: Callable[[], None]) -> int:
    """Does the work of a command. Returns 0, or tells what it raised: 1 for a failure, 2 for arguments that cannot work."""
    try:
        work()
    except Img2ImgError as error:
        return complain(program, describe_error(error, server))
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        return complain(program, f"{name}{error.strerror or error}")
    except ValueError as error:  # A number that the contract's types cannot hold, too large an image, flags at odds.
        return complain(program, str(error), status=2)
    return 0
