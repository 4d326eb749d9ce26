"""How the files of a model are read that somebody else wrote: regular files of the model's own folder, bounded before parsing.

A named pipe has no end to its reading, a link may lead to any file of this machine, and a JSON text of 64 MiB can become
gigabytes of objects. Standard library only: the exporter uses it before anything heavy is imported.
"""

import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

MOST_CONFIGURATION = 8 * 2**20
"""Bytes of a configuration, an index of weights or a manifest: the largest in use have about 2 MiB."""
MOST_TABLE = 64 * 2**20
"""Bytes of a tokenizer's JSON: Gemma 3's, with 262,144 words, has 33 MiB."""
MOST_VALUES = 500_000
"""Values in a configuration."""
MOST_TABLE_VALUES = 4_000_000
"""Values in a tokenizer's JSON: Gemma 3's has 2 million."""
MOST_FILES = 10_000
"""Files and folders of a model."""
MOST_HEADER = 32 * 2**20
"""Bytes of a safetensors header: the largest in use, with notes of a training in its metadata, have about 5 MiB."""
MOST_TENSORS = 100_000
"""Tensors in one safetensors file: the largest models have some thousands in one."""


def read_json(
    path: Path, most_bytes: int = MOST_CONFIGURATION, most_values: int = MOST_VALUES, pairs: Callable[[Any], Any] | None = None
) -> Any:
    """The value that the JSON file at `path` holds; `pairs` makes objects of lists of keys and values.

    Raises OSError, and ValueError if it is damaged, no regular file, larger than `most_bytes`, has more than `most_values`
    values, or is nested so deeply that only an attacker writes it.
    """
    return parse_json(read_bytes(path, most_bytes), most_values, pairs)


def parse_json(data: bytes | str, most_values: int = MOST_VALUES, pairs: Callable[[Any], Any] | None = None) -> Any:
    """The value that a JSON text is. Raises ValueError as `read_json` does."""
    marks: tuple[Any, ...] = (",", "[", "{") if isinstance(data, str) else (b",", b"[", b"{")
    if sum(map(data.count, marks)) > most_values:
        raise ValueError(f"it has more than {most_values} values")
    try:
        return json.loads(data, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_bytes(path: Path, most: int) -> bytes:
    """The contents of a regular file. Raises OSError, and ValueError if it is none or has more than `most` bytes.

    A named pipe or a device is refused without waiting for it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is not a regular file")
        if found.st_size > most:
            raise ValueError(f"it has {found.st_size} bytes, more than the {most} that such a file may have")
        return file.read(most)


def odd_file(folder: Path, allowed: Callable[[Path], bool] = lambda target: False) -> str | None:
    """Describes the first entry below `folder` that a model must not have, in a sentence with its path; None if there is none.

    Regular files and folders are allowed, and links to those that stay in `folder` or whose resolved target `allowed` accepts.
    """
    root, count = folder.resolve(), 0
    for parent, folders, names in walk(folder):
        for name in sorted((*folders, *names)):
            path, count = Path(parent, name), count + 1
            if count > MOST_FILES:
                return f"{folder} has more than {MOST_FILES} files: remove those that are not the model's"
            if problem := _problem(path, root, allowed):
                return f"{path} {problem}"
    return None


def walk(folder: Path) -> Iterator[tuple[str, Sequence[str], Sequence[str]]]:
    """os.walk through links: a folder's path, and the names of the folders and files in it.

    Each folder is entered once, as a link may lead to a folder above it.
    """
    seen = {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, followlinks=True):
        yield parent, tuple(folders), names
        reals = {name: os.path.realpath(Path(parent, name)) for name in folders}
        folders[:] = [name for name in folders if reals[name] not in seen]
        seen |= set(reals.values())


def _problem(path: Path, root: Path, allowed: Callable[[Path], bool]) -> str | None:
    try:
        target = path.resolve(strict=True)
        mode = target.stat().st_mode
    except OSError as error:
        return f"cannot be read ({error.strerror}): remove it, or get it again"
    except RuntimeError:  # Python before 3.13: a circle of links
        return "cannot be read (links in a circle): remove it, or get it again"
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return "is neither a regular file nor a folder (a pipe, socket or device): remove it"
    if not target.is_relative_to(root) and not allowed(target):
        return f"is a link that leads out of {root.name}/: put a copy of the file in its place"
    return None
