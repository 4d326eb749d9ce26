"""From what a person names to files on this machine: a local directory, or a repository of the Hugging Face hub.

What is loaded is a view, a directory of links to the chosen files only, so that its digest covers everything that was read
and nothing else of the checkpoint can be. Standard library only for a local directory.
"""

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from img2img_server.bundle import Source, digest_files

from img2img_export.checkpoint import INDEX_NAME, Layout, choose, names_below, read_index
from img2img_export.errors import ExportError
from img2img_export.options import ExportOptions

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The files of a model to export, below `directory`, and the record of where they came from."""

    directory: Path
    files: tuple[str, ...]
    layout: Layout
    source: Source

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum((self.directory / name).stat().st_size for name in self.files)

    def link_into(self, view: Path) -> None:
        """Fills `view` with links to the files."""
        for name in self.files:
            link = view / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((self.directory / name).resolve())


def resolve(options: ExportOptions, report: Callable[[str], None]) -> Checkpoint:
    """Finds the files of `options.source`, downloading those of a hub repository. Raises ExportError where it is refused."""
    local = Path(options.source)
    if local.is_dir():
        if options.revision is not None:
            raise ExportError(f"{local} is a directory: only a hub repository has revisions")
        directory, names, repo_id = local.resolve(), names_below(local), None
    elif local.exists():
        raise ExportError(f"{local} is a file: only directories in diffusers' layout are exported")
    elif _REPO_ID.fullmatch(options.source):
        from img2img_export.hub import download

        report(f"downloading {options.source}")
        directory, names = download(options)
        repo_id = options.source
    else:
        raise ExportError(f"{options.source} is neither a directory nor a hub repository's id (OWNER/NAME)")
    layout, files = choose(read_index(directory / INDEX_NAME), names, options)
    if missing := [name for name in files if not (directory / name).is_file()]:
        raise ExportError(f"{options.source} lacks {missing[0]}")
    source = Source(
        repo_id=repo_id,
        path=None if repo_id else str(directory),
        variant=options.variant,
        revision=options.revision,
        allow_patterns=options.allow_patterns,
        ignore_patterns=options.ignore_patterns,
        digest=_digest(directory, files),
    )
    return Checkpoint(directory, tuple(files), layout, source)


def _digest(directory: Path, names: Iterable[str]) -> str:
    """SHA-256 over the files' names and contents, in hexadecimal."""
    lines = (f"{name}\0{digest}\n" for name, digest in digest_files(directory, names).items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()
