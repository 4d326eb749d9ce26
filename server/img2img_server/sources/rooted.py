"""Reading a file below a folder, and nothing else: no path out of it, no link swapped on the way, no device that hangs."""

import os
import stat
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import unquote, urlsplit

from img2img_server.errors import InvalidField

_NONE = "there is no such file in the folder that this server reads files from"
"""For whatever is not there, not below the root or not readable, alike: what lies elsewhere is nobody's business."""


_MOST_CHARACTERS = 3 * 4096 + 100
"""Of a "file:" URI: no path has more than 4096 bytes, each of which may be percent-encoded."""


def path_of(uri: str, field: str) -> Path:
    """The absolute path that a "file:" URI names. Raises InvalidField, naming `field`, for a URI that names none."""
    if len(uri) > _MOST_CHARACTERS:
        raise InvalidField(field, f"the address has {len(uri)} characters, the most is {_MOST_CHARACTERS}")
    try:
        parts = urlsplit(uri)
    except ValueError:
        raise InvalidField(field, "a file: URI is such as file:///folder/picture.png") from None
    if parts.netloc not in ("", "localhost"):
        raise InvalidField(field, "a file: URI names no host, or localhost")
    path = unquote(parts.path, errors="surrogateescape")
    if parts.query or parts.fragment or not path.startswith("/") or "\0" in path:
        raise InvalidField(field, "a file: URI is such as file:///folder/picture.png; ?, # and % in names are percent-encoded")
    return Path(path)


def read_below(root: Path, path: Path, most: int, field: str) -> bytes:
    """The bytes of a regular file below `root`. Links are followed as long as they stay below it. It blocks.

    Raises InvalidField, naming `field`, where there is none or it has more than `most` bytes.
    """
    try:
        base = root.resolve(strict=True)
        inner = path.resolve(strict=True).relative_to(base)
        with ExitStack() as opened:
            return _read(_open(base, inner, opened), most, field)
    except (OSError, ValueError, RuntimeError):  # RuntimeError: links in a circle
        raise InvalidField(field, _NONE) from None


def _open(base: Path, inner: Path, opened: ExitStack) -> int:
    """A descriptor of the file: folder by folder from the root, and without links, as one may have been put there just now."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(base, flags | os.O_DIRECTORY)
    opened.callback(os.close, descriptor)
    for index, part in enumerate(inner.parts, 1):
        # O_NONBLOCK: opening a FIFO would else wait for somebody who writes to it.
        kind = os.O_NONBLOCK if index == len(inner.parts) else os.O_DIRECTORY
        descriptor = os.open(part, flags | kind, dir_fd=descriptor)
        opened.callback(os.close, descriptor)
    return descriptor


def _read(descriptor: int, most: int, field: str) -> bytes:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise InvalidField(field, _NONE)
    with os.fdopen(os.dup(descriptor), "rb") as file:
        data = file.read(most + 1)  # not as much as fstat says: it may be growing
    if len(data) > most:
        raise InvalidField(field, f"the file has more than {most} bytes, which is the most")
    return data
