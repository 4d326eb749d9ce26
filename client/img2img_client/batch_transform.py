"""`img2img transform IN ... --output-dir DIR`: many images, or many prompts, through one call."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from img2img_client.errors import Img2ImgError
from img2img_client.output import Output
from img2img_client.reporting import describe_error
from img2img_client.values import FORMAT_OF_SUFFIX, ImageFormat, TransformResult

if TYPE_CHECKING:
    from img2img_client.batch import BatchItem
    from img2img_client.client import Client
    from img2img_client.options import TransformOptions


@dataclass(frozen=True, slots=True)
class Task:
    """One request: its source as given on the command line, its prompt (None: the server's default), and its files."""

    source: str
    prompt: str | None
    output: Output

    @property
    def name(self) -> str:
        """Its name in messages: the output file."""
        return str(self.output.path)

    @property
    def is_done(self) -> bool:
        """Whether each of its files exists."""
        return all(path.exists() for path in self.output.paths(self.output.count))


def plan_tasks(arguments: argparse.Namespace) -> list[Task]:
    """A task per image and prompt. Raises ValueError if two would write the same file, OSError if the prompts cannot be read."""
    folder = Path(arguments.output_dir)
    prompts = [arguments.prompt] if arguments.prompts is None else _read_prompts(arguments.prompts)
    file_format: ImageFormat = arguments.format or "png"
    suffix = next(suffix for suffix, name in FORMAT_OF_SUFFIX.items() if name == file_format)
    digits = len(str(len(prompts)))
    tasks: dict[Path, Task] = {}
    for source in arguments.image:
        if source == "-":
            raise ValueError("IN -: standard input is one image; give --output FILE instead of --output-dir")
        stem = Path(source.rpartition(":")[2]).stem
        for number, prompt in enumerate(prompts, start=1):
            numbered = stem if len(prompts) == 1 else f"{stem}-{number:0{digits}}"
            path = folder / (numbered + suffix)
            if path in tasks:
                raise ValueError(f"{tasks[path].source} and {source} would both be written to {path}")
            tasks[path] = Task(source, prompt, Output(path, max(1, arguments.image_count or 1), file_format))
    return list(tasks.values())


def _read_prompts(file: Path) -> Sequence[str]:
    """The lines of a file that are not blank. Raises ValueError if there is none."""
    prompts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts {file}: the file has no prompts, which are one to a line")
    return prompts


def transform_tasks(
    client: "Client", tasks: Sequence[Task], options: "TransformOptions", arguments: argparse.Namespace, server: str
) -> int:
    """Transforms, writes and reports. Returns how many tasks failed.

    A task whose files exist is skipped unless arguments.overwrite is set. Files appear under their name once they are complete.
    """
    Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)
    todo = [task for task in tasks if arguments.overwrite or not task.is_done]
    skipped = [task for task in tasks if task not in todo]
    failed: dict[str, str] = {}
    done: list[str] = []

    def say(line: str) -> None:
        if not arguments.quiet:
            print(line, file=sys.stderr)

    def items() -> "Iterator[BatchItem]":
        for task in todo:
            yield task.source, {**options, "prompt": task.prompt, "format": task.output.format}

    if skipped:
        say(f"{len(skipped)} of {len(tasks)} exist already and are skipped; --overwrite transforms them again")
    for count, outcome in enumerate(client.transform_batch(items()), start=1):
        task = todo[outcome.index]
        if outcome.result is not None:
            done += _write(task.output, outcome.result)
            say(f"{count} of {len(todo)}: {task.source} -> {task.name}")
        else:
            failed[task.name] = _describe(outcome.error, server)
            say(f"{count} of {len(todo)}: {task.source} failed: {failed[task.name]}")
    if arguments.json:
        print(json.dumps({"written": done, "skipped": [task.name for task in skipped], "failed": failed}))
    else:
        say(f"{len(todo) - len(failed)} transformed, {len(skipped)} skipped, {len(failed)} failed")
        for name, reason in failed.items():
            print(f"{name}: {reason}", file=sys.stderr)
    return len(failed)


def _write(output: Output, result: TransformResult) -> list[str]:
    paths = output.paths(len(result.images))
    for path, image in zip(paths, result.images, strict=True):
        part = path.with_name(f".{path.name}.part")
        part.write_bytes(image.data)
        part.replace(path)
    return [str(path) for path in paths]


def _describe(error: Exception | None, server: str) -> str:
    if isinstance(error, Img2ImgError):
        return describe_error(error, server)
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)
