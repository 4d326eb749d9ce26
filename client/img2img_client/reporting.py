"""Error reporting of commands: one line on standard error, and an exit status."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from img2img_client.errors import Img2ImgError, Unauthenticated, Unavailable

if TYPE_CHECKING:
    from img2img_client.retry import OnRetry


def print_error(program: str, message: str, status: int = 1) -> int:
    """Prints one line on standard error and returns the exit status."""
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
    return status


def describe_error(error: Img2ImgError, server: str) -> str:
    """The error in one line: the invalid fields, the time to wait, or the request id."""
    if error.fields:
        return "; ".join(f"{field}: {description}" for field, description in error.fields)
    if isinstance(error, Unavailable) and not error.reason:
        return f"no response from {server}: {error.message}"
    if isinstance(error, Unauthenticated):
        return f"{error.message} (set --token-file or $IMG2IMG_TOKEN)"
    wait = "" if error.retry_after is None else f" (retry after {error.retry_after:.3g} s)"
    name = f" (request {error.request_id})" if error.status in _FOR_THE_OPERATOR and error.request_id else ""
    return f"{error.message}{wait}{name}"


def retry_report(program: str, server: str) -> "OnRetry":
    """Prints each failure that is retried, and the wait."""

    def report(made: int, error: Img2ImgError, wait: float) -> None:
        print_error(program, f"{describe_error(error, server)}; retrying in {wait:.1f} s")

    return report


_FOR_THE_OPERATOR = ("INTERNAL", "UNKNOWN", "DATA_LOSS")
"""Statuses whose cause is in the server's log, under the request id."""


def attempt(program: str, server: str, work: Callable[[], None]) -> int:
    """Runs `work`. Returns 0, or prints its error and returns 1 for a failure, 2 for invalid arguments."""
    try:
        work()
    except Img2ImgError as error:
        return print_error(program, describe_error(error, server))
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        return print_error(program, f"{name}{error.strerror or error}")
    except ValueError as error:  # A number out of range, too large an image, contradicting flags.
        return print_error(program, str(error), status=2)
    return 0
