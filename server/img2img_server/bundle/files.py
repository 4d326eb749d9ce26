"""Reads untrusted files of a model: only regular files in the model's folder, with bounds that are checked before parsing.

Reading a named pipe may never end, a link may lead to any file of this machine, and a JSON text of 64 MiB can become gigabytes of
objects. Standard library only: the exporter uses it before heavy imports.
"""

import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

MOST_CONFIGURATION = 8 * 2**20
"""Maximum bytes of a configuration, an index of weights or a manifest: the largest in use have about 2 MiB."""
MOST_TABLE = 64 * 2**20
"""Maximum bytes of a tokenizer's JSON: Gemma 3's, with 262,144 words, has 33 MiB."""
MOST_VALUES = 500_000
"""Maximum number of values in a configuration."""
MOST_TABLE_VALUES = 4_000_000
"""Maximum number of values in a tokenizer's JSON: Gemma 3's has 2 million."""
MOST_FILES = 10_000
"""Maximum number of files and folders of a model."""
MOST_HEADER = 32 * 2**20
"""Maximum bytes of a safetensors header: the largest in use, with training notes in the metadata, have about 5 MiB."""
MOST_TENSORS = 100_000
"""Maximum number of tensors in a safetensors file: the largest models have some thousands."""
MOST_LAYERS = 10_000
"""Maximum number of layers that a configuration may ask for, where there is an entry for each: SDXL has 70 cross-attentions."""
DAMAGED = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
"""The errors of a configuration that cannot be read, or has values of the wrong type, such as an infinite integer."""


def read_json(
    path: Path, most_bytes: int = MOST_CONFIGURATION, most_values: int = MOST_VALUES, pairs: Callable[[Any], Any] | None = None
) -> Any:
    """Reads a JSON file. `pairs` is json.loads' `object_pairs_hook`.

    Raises OSError, and ValueError if it is damaged, not a regular file, larger than `most_bytes`, has more than `most_values`
    values, or is nested too deeply.
    """
    return parse_json(read_bytes(path, most_bytes), most_values, pairs)


def parse_json(data: bytes | str, most_values: int = MOST_VALUES, pairs: Callable[[Any], Any] | None = None) -> Any:
    """Parses a JSON text. Raises ValueError like `read_json`."""
    marks: tuple[Any, ...] = (",", "[", "{") if isinstance(data, str) else (b",", b"[", b"{")
    if sum(map(data.count, marks)) > most_values:
        raise ValueError(f"it has more than {most_values} values")
    try:
        return json.loads(data, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_safetensors_header(path: Path) -> tuple[bytes, int]:
    """The JSON text of a safetensors file's header, and the length that it should have: a truncated file has less. Raises
    OSError, and ValueError if the header is too long or lists too many tensors."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MOST_HEADER:
            raise ValueError(f"its header has more than {MOST_HEADER} bytes")
        header = file.read(length)
    if header.count(b"data_offsets") > MOST_TENSORS:
        raise ValueError(f"it has more than {MOST_TENSORS} tensors")
    return header, length


def read_bytes(path: Path, most: int) -> bytes:
    """Reads a regular file. Raises OSError, and ValueError if it is another kind of file or has more than `most` bytes.

    Does not block on a named pipe or a device.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is not a regular file")
        if found.st_size > most:
            raise ValueError(f"it has {found.st_size} bytes, the maximum is {most}")
        return file.read(most)


def add_layers(widths: list[Any], width: Any, count: int) -> None:
    """Adds the width of `count` more layers to `widths`. Raises ValueError for more than MOST_LAYERS."""
    if count > MOST_LAYERS - len(widths):
        raise ValueError(f"it has more than {MOST_LAYERS} layers")
    widths += [width] * count


def odd_file(folder: Path, allowed: Callable[[Path], bool] = lambda target: False) -> str | None:
    """Describes the first entry in `folder` that a model must not have, in a sentence with its path; None if there is none.

    Allowed are regular files, folders, and links to them if the target is in `folder` or accepted by `allowed`.
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
    """os.walk that follows links: yields a folder's path, the names of its folders, and the names of its files.

    Each folder is entered once, because a link may lead to a parent folder.
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
        return f"cannot be read ({error.strerror}): remove it, or download it again"
    except RuntimeError:  # Python before 3.13: a circle of links
        return "cannot be read (links in a circle): remove it, or download it again"
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return "is neither a regular file nor a folder (a pipe, socket or device): remove it"
    if not target.is_relative_to(root) and not allowed(target):
        return f"is a link that leads out of {root.name}/: replace it by a copy of the file"
    return None
