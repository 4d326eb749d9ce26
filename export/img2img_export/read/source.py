"""From what a person names to files on this machine: a directory, one file, or a repository of the Hugging Face hub.

What is loaded is a view, a directory of links to the chosen files only (`fill_tree`), so that its digest covers everything
that was read and nothing else of the checkpoint can be. Standard library only for what is on this machine already.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from img2img_server.bundle.files import odd_file
from img2img_server.bundle.manifest import Lora, Source
from img2img_server.runtime.common.pipe import latent_size

from img2img_export.errors import ExportError
from img2img_export.options import ExportOptions
from img2img_export.progress import Progress
from img2img_export.read import lora, single_file
from img2img_export.read.checkpoint import INDEX_NAME, TEXT_SUFFIXES, Kind, Layout, choose, names_below, read_index, refuse_unsafe
from img2img_export.read.digests import Digests
from img2img_export.read.layout_checks import refuse_configurations, refuse_unreadable_files, why_no_index
from img2img_export.read.single_file import find_template, refuse_unreadable
from img2img_export.read.texts import has_mark, read_json, without_mark
from img2img_export.read.weights_file import SAFETENSORS, is_pickle, is_safetensors

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The files of a model to export, below `directory`, and the record of where they came from.

    A single file's weights are `weights`, and the files are those of its template.
    """

    directory: Path
    files: tuple[str, ...]
    layout: Layout
    source: Source
    kind: Kind = "diffusers"
    weights: Path | None = None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        paths = [self.directory / name for name in self.files]
        return sum(path.stat().st_size for path in (*paths, *([self.weights] if self.weights else [])))

    def link_into(self, view: Path) -> None:
        """Fills `view` with links to the files. A text that begins with a byte order mark is written without it."""
        for name in self.files:
            link, file = view / name, self.directory / name
            link.parent.mkdir(parents=True, exist_ok=True)
            if is_safetensors(name):
                # diffusers takes another case of the suffix for a pickle.
                link.with_suffix(SAFETENSORS).symlink_to(file.resolve())
            elif name.endswith(TEXT_SUFFIXES) and has_mark(file):
                link.write_text(without_mark(file), encoding="utf-8")
            else:
                link.symlink_to(file.resolve())


def resolve(options: ExportOptions, progress: Progress) -> Checkpoint:
    """Finds the files of `options.source`, downloading those of a hub repository. Raises ExportError where it is refused."""
    digests = Digests()
    find = _single_file if Path(options.source).is_file() else _layout
    checkpoint = find(options, digests, progress)
    digests.save()
    return checkpoint


def _single_file(options: ExportOptions, digests: Digests, progress: Progress) -> Checkpoint:
    path = Path(options.source)
    refuse_unreadable(path)
    if options.variant or options.revision or options.allow_patterns or options.ignore_patterns:
        raise ExportError(f"{path} is a single file: it has no variants or revisions, and there is nothing to choose by patterns")
    path = path.resolve()
    read = digests.digest_files(path.parent, [path.name], progress)
    directory, layout, files = find_template(options, read[path.name], digests, progress)
    _refuse_odd(directory)
    refuse_unreadable_files(directory, files)
    refuse_configurations(directory, layout.pipeline_class, layout.components)
    refuse_unsafe(directory, files)
    source = Source(path=str(path), digest=_combine(read | digests.digest_files(directory, files)))
    return Checkpoint(directory, tuple(files), layout, source, "single-file", path)


def _layout(options: ExportOptions, digests: Digests, progress: Progress) -> Checkpoint:
    if options.config is not None:
        raise ExportError(f"{options.source} has its own configurations: --config is for a single file")
    directory, names, repo_id = _locate(options, progress)
    _refuse_odd(directory)
    if INDEX_NAME not in names:
        raise ExportError(why_no_index(directory, names))
    kind, layout, files = choose(read_index(directory / INDEX_NAME), names, options)
    if missing := [name for name in files if not (directory / name).is_file()]:
        raise ExportError(f"{options.source} lacks {missing[0]}")
    refuse_unreadable_files(directory, files)
    refuse_configurations(directory, layout.pipeline_class, layout.components)
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
    """The directory in diffusers' layout, the names of its files, and the repository's id if it is one's snapshot."""
    local = Path(options.source)
    if local.is_dir():
        if options.revision is not None:
            raise ExportError(f"{local} is a directory: only a hub repository has revisions")
        return local.resolve(), names_below(local), None
    if is_safetensors(local.name) or is_pickle(local.name):
        raise ExportError(f"{local} is not a file")
    if not _REPO_ID.fullmatch(options.source):
        raise ExportError(f"{options.source} is neither a directory, a file nor a hub repository's id (OWNER/NAME)")
    from img2img_export.read.hub import download

    progress.stage(f"finding {options.source} on the hub")
    directory, names = download(options.source, options.revision, lambda index, names: choose(index, names, options)[2], progress)
    return directory, names, options.source


def _refuse_odd(directory: Path) -> None:
    """Raises ExportError for pipes, devices and links that lead out of a model's directory. The snapshots in the hub's cache are
    links to the files beside them: `models--OWNER--NAME/snapshots/COMMIT/FILE` to `models--OWNER--NAME/blobs/HASH`."""
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
    """Makes the empty `directory` a checkpoint: what is in it, and the LoRAs that were fused into its weights.

    It loads with the variant of `options`. Raises ExportError where a single file or a LoRA does not fit.
    """
    if checkpoint.kind == "onnx" and options.loras:
        raise ExportError(f"{options.loras[0].path} cannot be fused: {options.source} holds graphs; export the weights with it")
    checkpoint.link_into(directory)
    layout = checkpoint.layout
    _use_plain_size(directory / "unet" / "config.json")
    if checkpoint.weights is not None:
        layout = single_file.convert(checkpoint.weights, layout, directory, progress)
    return layout, lora.fuse(directory, layout, options.loras, progress)


def _use_plain_size(config: Path) -> None:
    """Writes a square `sample_size` that is a list or a text as a number, in place of a link: some classes compare it to one."""
    if not config.is_file():
        return
    values = read_json(config)
    stated = values.get("sample_size") if isinstance(values, dict) else None
    size = latent_size(stated)
    if size is not None and size[0] == size[1] and not isinstance(stated, int):
        config.unlink()
        config.write_text(json.dumps({**values, "sample_size": size[0]}, indent=2) + "\n", encoding="utf-8")
