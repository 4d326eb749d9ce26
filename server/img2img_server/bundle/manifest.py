"""The bundle's format: what `img2img export` writes and `img2img serve` reads.

A bundle is a directory in the layout of diffusers (model_index.json, one folder per component) plus manifest.json,
which is written last. This module needs the standard library only; the exporter imports it too.
"""

import dataclasses
import hashlib
import json
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from img2img_server.bundle.files import read_json
from img2img_server.errors import BundleError

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
HEAD_NAME, BODY_NAME = "head.onnx", "body.onnx"
"""A denoiser's graph in two, beside the whole one: waves of the timestep, to be computed in float32; and all that takes them."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model came from: exactly one of `repo_id` and `path`, and what was taken of it.

    `digest` is the SHA-256 over the names and contents of the files that were read, so that an unchanged source is known.
    """

    repo_id: str | None = None
    path: str | None = None
    variant: str | None = None
    revision: str | None = None
    allow_patterns: tuple[str, ...] = ()
    ignore_patterns: tuple[str, ...] = ()
    digest: str = ""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output of a graph. A dimension that varies is named, one that is fixed is a number."""

    name: str
    type: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA that was fused into the weights: its file's name and SHA-256, and the scale it was fused with."""

    name: str
    scale: float
    digest: str


@dataclass(frozen=True, slots=True)
class Component:
    """One part of the model. `precision` is that of its weights: fp32, fp16, bf16 or int8. A torch component has no graph.

    `reason` says why the precision is not the one that was asked for. A graph is `NAME/model.onnx`; `fused` is the path in
    the bundle of a second graph of the same part, with ONNX Runtime's fused operators for CUDA, or empty. `bytes` are those
    of its weights.
    """

    name: str
    precision: str
    opset: int | None = None
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    backend: Literal["onnx", "torch"] = "onnx"
    reason: str = ""
    fused: str = ""
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class ComponentParity:
    """How far a graph's output is from that of PyTorch in fp32 on the same input.

    `max_abs_error` in the output's own units, `relative_error` as the L2 norm of the difference over the reference's.
    `graph` is "plain" or "fused".
    """

    component: str
    case: str
    max_abs_error: float
    relative_error: float
    passed: bool
    graph: str = "plain"


@dataclass(frozen=True, slots=True)
class PictureParity:
    """How far a finished image is from the one that diffusers draws in fp32 with the same seed.

    `max_abs_error` in steps of 1/255, `psnr_db` in decibels (infinite is stored as 999), `ssim` the structural similarity,
    1 for equal images.
    """

    case: str
    max_abs_error: int
    psnr_db: float
    passed: bool
    ssim: float = 1.0


@dataclass(frozen=True, slots=True)
class Reference:
    """An image that diffusers drew in fp32 at export, and what it was asked: to judge by, where it is drawn in another way.

    `source` and `picture` are paths in the bundle of lossless RGB files of the same size.
    """

    case: str
    source: str
    picture: str
    prompt: str
    negative_prompt: str
    strength: float
    num_inference_steps: int
    guidance_scale: float
    seed: int


@dataclass(frozen=True, slots=True)
class Verification:
    """What was measured at export. A bundle that did not pass is not served, unless the server is told to.

    `problems` says in a line each what did not pass; `limits` what was to be kept, by name (`max_abs_error`,
    `relative_error`, `psnr_db`, `ssim`). `reference` names what it was compared with.
    """

    passed: bool
    components: tuple[ComponentParity, ...] = ()
    pictures: tuple[PictureParity, ...] = ()
    problems: tuple[str, ...] = ()
    limits: dict[str, float] = field(default_factory=dict)
    reference: str = "diffusers in fp32"


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything the server needs to know of a bundle before it opens any other file of it.

    `pipeline_class` names diffusers' img2img class. `files` maps each file's path in the bundle to its SHA-256.
    `latent_preview` turns latents into colours, for previews: rows for red, green and blue, from 0 to 1, each with four
    weights for every latent channel (`runtime/diffusion/preview.py` says of what) and a bias; () where there is no such map.
    `backend` is "hybrid" where the denoiser alone is a graph, and the rest PyTorch; `backend_reason` says why it is not "onnx".
    `precision` is the one that was asked for. `size_multiple` is what width and height must be multiples of, in pixels, where
    the graphs want more than the pipeline's class does. `references` are the images that were compared with; () where the
    bundle was made without diffusers.
    """

    source: Source
    pipeline_class: str
    family: str
    backend: Literal["onnx", "hybrid", "torch"]
    components: tuple[Component, ...]
    files: dict[str, str]
    tools: dict[str, str]
    verification: Verification
    backend_reason: str | None = None
    options: dict[str, str] = field(default_factory=dict)
    latent_preview: tuple[tuple[float, ...], ...] = ()
    precision: str = "fp32"
    loras: tuple[Lora, ...] = ()
    size_multiple: int | None = None
    references: tuple[Reference, ...] = ()
    format_version: int = FORMAT_VERSION

    @property
    def digest(self) -> str:
        """The SHA-256 over the names and contents of the bundle's files, in hexadecimal."""
        lines = (f"{digest}  {name}\n" for name, digest in sorted(self.files.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_manifest(bundle: Path, manifest: Manifest) -> None:
    """Writes `manifest` into the directory `bundle`, durably: it is either whole or not there."""
    temporary = bundle / f".{MANIFEST_NAME}.part"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(dataclasses.asdict(manifest), file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(bundle / MANIFEST_NAME)


def read_manifest(bundle: Path) -> Manifest:
    """Reads the manifest of the directory `bundle`. Raises BundleError where it is missing, damaged or of another format."""
    path = bundle / MANIFEST_NAME
    try:
        data = read_json(path)
    except FileNotFoundError:
        raise BundleError(f"{bundle} is no bundle: it has no {MANIFEST_NAME}") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict) or data.get("format_version") != FORMAT_VERSION:
        version = data.get("format_version") if isinstance(data, dict) else None
        raise BundleError(f"{path} has format version {version!r}, this server reads {FORMAT_VERSION}: export the model again")
    return _parse(Manifest, data, str(path))


def check_bundle(bundle: Path, manifest: Manifest, allow_unverified: bool = False) -> None:
    """Raises BundleError unless verification passed and every file is there with the contents that were verified.

    With `allow_unverified` a bundle passes whose verification failed; its files are checked all the same.
    """
    if not manifest.verification.passed and not allow_unverified:
        why = "".join(f": {problem}" for problem in manifest.verification.problems[:1])
        raise BundleError(f"{bundle} did not pass verification when it was exported{why}; --allow-unverified serves it")
    for name, expected in manifest.files.items():
        path = bundle / name
        if not path.resolve().is_relative_to(bundle.resolve()):
            raise BundleError(f"{bundle} names a file outside itself: {name}")
        if not path.is_file():
            raise BundleError(f"{bundle} lacks {name}")
        if sha256_of(path) != expected:
            raise BundleError(f"{path} is not the file that was verified: its SHA-256 differs from the manifest's")


def list_files(bundle: Path) -> list[str]:
    """The paths, relative to `bundle` and sorted, of every file in it but the manifest."""
    return sorted(
        path.relative_to(bundle).as_posix()
        for path in bundle.rglob("*")
        if path.is_file() and not path.name.endswith(".part") and path != bundle / MANIFEST_NAME
    )


def digest_files(root: Path, names: Iterable[str]) -> dict[str, str]:
    """Maps each of `names` to the SHA-256 of that file below `root`."""
    return {name: sha256_of(root / name) for name in names}


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in lower-case hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse(kind: type[_T], data: Any, where: str) -> _T:
    """Builds a dataclass from JSON data. Unknown, missing and wrongly typed keys raise BundleError."""
    if not isinstance(data, Mapping):
        raise BundleError(f"{where}: expected an object")
    types_of = typing.get_type_hints(kind)
    names = {item.name: item for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := set(data) - set(names):
        raise BundleError(f"{where}: unknown keys {sorted(unknown)}")
    values = {name: _value(types_of[name], data[name], f"{where}: {name}") for name in names if name in data}
    try:
        return kind(**values)
    except TypeError as error:
        raise BundleError(f"{where}: {error}") from None


def _value(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _parse(typing.cast(type[Any], kind), value, where)
    readers: dict[Any, Callable[[], Any]] = {
        tuple: lambda: tuple(_value(arguments[0], item, where) for item in _expect(list, value, where)),
        dict: lambda: {key: _value(arguments[1], item, where) for key, item in _expect(dict, value, where).items()},
        Literal: lambda: _member(value, arguments, where),
        types.UnionType: lambda: _any_of(arguments, value, where),
    }
    if origin in readers:
        return readers[origin]()
    if kind is float and type(value) is int:
        return float(value)
    return _expect(kind, value, where)


def _expect(kind: type[_T], value: Any, where: str) -> _T:
    if type(value) is not kind:
        raise BundleError(f"{where}: expected {kind.__name__}, found {type(value).__name__}")
    return value


def _member(value: Any, allowed: tuple[Any, ...], where: str) -> Any:
    if value not in allowed:
        raise BundleError(f"{where}: expected one of {', '.join(map(str, allowed))}")
    return value


def _any_of(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    for kind in kinds:
        if type(value) is kind:
            return value
    raise BundleError(f"{where}: unexpected {type(value).__name__}")
