"""Resolves a source (a directory, a file, or a repository on the Hugging Face hub) to local files.

Models are loaded from a checkpoint tree: a directory of links to the chosen files only (`fill_tree`), so that the digest covers
exactly the files that can be read. Local sources need the standard library only.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from img2img_server.bundle.files import odd_file
from img2img_server.bundle.manifest import Lora, Source
from img2img_server.runtime.common.pipe import latent_size

from img2img_export.errors import ExportError
from img2img_export.options import ExportOptions
from img2img_export.progress import Progress
from img2img_export.read import lora, single_file
from img2img_export.read.checkpoint import (
    CONFIG_NAME,
    INDEX_NAME,
    TEXT_SUFFIXES,
    Kind,
    Layout,
    choose,
    is_component,
    names_below,
    read_index,
    refuse_unsafe,
)
from img2img_export.read.digests import Digests
from img2img_export.read.layout_checks import own_class, refuse_configurations, refuse_unreadable_files, why_no_index
from img2img_export.read.single_file import find_template, refuse_unreadable
from img2img_export.read.texts import has_mark, read_json, without_mark
from img2img_export.read.weights_file import SAFETENSORS, is_pickle, is_safetensors

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The files of a model to export, in `directory`, and their source for the manifest.

    For a single file, `weights` is that file and `files` are those of its template.
    """

    directory: Path
    files: tuple[str, ...]
    layout: Layout
    source: Source
    kind: Kind = "diffusers"
    weights: Path | None = None

    @property
    def size(self) -> int:
        """Total bytes of all files."""
        paths = [self.directory / name for name in self.files]
        return sum(path.stat().st_size for path in (*paths, *([self.weights] if self.weights else [])))

    def link_into(self, tree: Path) -> None:
        """Fills `tree` with links to the files. A text with a byte order mark is copied without it."""
        # A component's files are in the folder that a pipeline has for it.
        (folder,) = self.layout.components if self.kind == "companion" else (".",)
        for name in self.files:
            link, file = tree / folder / name, self.directory / name
            link.parent.mkdir(parents=True, exist_ok=True)
            if is_safetensors(name):
                # diffusers treats the suffix in another case as a pickle.
                link.with_suffix(SAFETENSORS).symlink_to(file.resolve())
            elif name.endswith(TEXT_SUFFIXES) and has_mark(file):
                link.write_text(without_mark(file), encoding="utf-8")
            else:
                link.symlink_to(file.resolve())


def resolve(options: ExportOptions, progress: Progress) -> Checkpoint:
    """Finds the files of `options.source`, downloading those of a hub repository. Raises ExportError if it is refused."""
    digests = Digests()
    find = _single_file if Path(options.source).is_file() else _layout
    checkpoint = find(options, digests, progress)
    digests.save()
    return checkpoint


def _single_file(options: ExportOptions, digests: Digests, progress: Progress) -> Checkpoint:
    path = Path(options.source)
    refuse_unreadable(path)
    if options.variant or options.revision or options.allow_patterns or options.ignore_patterns:
        raise ExportError(f"{path} is a single file: --variant, --revision and patterns do not apply")
    path = path.resolve()
    read = digests.digest_files(path.parent, [path.name], progress)
    directory, layout, files = find_template(options, read[path.name], digests, progress)
    _refuse_odd(directory)
    refuse_unreadable_files(directory, files)
    refuse_configurations(directory, layout.pipeline_class, layout.components)
    layout = replace(layout, pipeline_class=own_class(directory, layout.pipeline_class))
    refuse_unsafe(directory, files)
    source = Source(path=str(path), digest=_combine(read | digests.digest_files(directory, files)))
    return Checkpoint(directory, tuple(files), layout, source, "single-file", path)


def _layout(options: ExportOptions, digests: Digests, progress: Progress) -> Checkpoint:
    if options.config is not None:
        raise ExportError(f"{options.source} has its own configurations: --config is only for a single file")
    directory, names, repo_id = _locate(options, progress)
    _refuse_odd(directory)
    if INDEX_NAME not in names and not is_component(names):
        raise ExportError(why_no_index(directory, names))
    index = read_index(directory / (CONFIG_NAME if is_component(names) else INDEX_NAME))
    kind, layout, files = choose(index, names, options)
    if missing := [name for name in files if not (directory / name).is_file()]:
        raise ExportError(f"{options.source} lacks the file {missing[0]}")
    refuse_unreadable_files(directory, files)
    refuse_configurations(directory, layout.pipeline_class, layout.components)
    layout = replace(layout, pipeline_class=own_class(directory, layout.pipeline_class))
    refuse_unsafe(directory, files)
    source = Source(
        repo_id=repo_id,
        path=None if repo_id else str(directory),
        variant=options.variant,
        revision=options.revision,
        allow_patterns=options.allow_patterns,
        ignore_patterns=options.ignore_patterns,
        digest=_combine(digests.digest_files(directory, files, progress)),
    )
    return Checkpoint(directory, tuple(files), layout, source, kind)


def _locate(options: ExportOptions, progress: Progress) -> tuple[Path, list[str], str | None]:
    """The directory in diffusers' layout, the names of its files, and the repository id if it is a hub snapshot."""
    local = Path(options.source)
    if local.is_dir():
        if options.revision is not None:
            raise ExportError(f"{local} is a directory: --revision is only for a hub repository")
        return local.resolve(), names_below(local), None
    if is_safetensors(local.name) or is_pickle(local.name):
        raise ExportError(f"{local} does not exist or is not a file")
    if not _REPO_ID.fullmatch(options.source):
        raise ExportError(f"{options.source} is neither a directory, a file nor a hub repository's id (OWNER/NAME)")
    from img2img_export.read.hub import download

    progress.stage(f"finding {options.source} on the hub")
    directory, names = download(options.source, options.revision, lambda index, names: choose(index, names, options)[2], progress)
    return directory, names, options.source


def _refuse_odd(directory: Path) -> None:
    """Raises ExportError for pipes, devices and links out of a model's directory. Snapshots in the hub's cache may link to blobs:
    `models--OWNER--NAME/snapshots/COMMIT/FILE` to `models--OWNER--NAME/blobs/HASH`."""
    repository = directory.parent.parent
    blobs = repository / "blobs"
    cached = directory.parent.name == "snapshots" and repository.name.startswith("models--")
    if problem := odd_file(directory, lambda target: cached and target.parent == blobs):
        raise ExportError(problem)


def _combine(digests: Mapping[str, str]) -> str:
    """SHA-256 over the files' names and contents, in hexadecimal."""
    lines = (f"{name}\0{digest}\n" for name, digest in digests.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def fill_tree(
    checkpoint: Checkpoint, options: ExportOptions, directory: Path, progress: Progress
) -> tuple[Layout, tuple[Lora, ...]]:
    """Fills the empty `directory` with a checkpoint in diffusers' layout. Returns its layout and the fused LoRAs.

    It loads with the variant of `options`. Raises ExportError if a single file or a LoRA does not fit.
    """
    if checkpoint.kind == "onnx" and options.loras:
        raise ExportError(
            f"{options.loras[0].path} cannot be fused: {options.source} holds ONNX graphs; export the PyTorch weights with it"
        )
    checkpoint.link_into(directory)
    layout = checkpoint.layout
    _use_plain_size(directory / "unet" / "config.json")
    if checkpoint.weights is not None:
        layout = single_file.convert(checkpoint.weights, layout, directory, progress)
    return layout, lora.fuse(directory, layout, options.loras, progress)


def _use_plain_size(config: Path) -> None:
    """Converts a square `sample_size` that is a list or a string to a number, as some classes require; replaces a link."""
    if not config.is_file():
        return
    values = read_json(config)
    stated = values.get("sample_size") if isinstance(values, dict) else None
    size = latent_size(stated)
    if size is not None and size[0] == size[1] and not isinstance(stated, int):
        config.unlink()
        config.write_text(json.dumps({**values, "sample_size": size[0]}, indent=2) + "\n", encoding="utf-8")
