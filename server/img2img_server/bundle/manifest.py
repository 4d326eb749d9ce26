"""The bundle's format: what `img2img export` writes and `img2img serve` reads.

A bundle is a directory in diffusers' layout (model_index.json, one folder per component) with a manifest.json, which is written
last. Standard library only: the exporter imports this module, too.
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
from img2img_server.bundle.speedups import NONE, Speedups
from img2img_server.errors import BundleError

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
HEAD_NAME, BODY_NAME = "head.onnx", "body.onnx"
"""The split graph of a denoiser, beside the whole one: the timestep embedding, to be computed in float32, and the rest."""
FUSED_ATTENTION = "_fused_attention.onnx"
"""How the file names of a transformer's graphs end whose attention is one operator, which the CPU provider has, too."""

Precision = Literal["fp32", "fp16", "bf16", "int8"]
"""Precision of a graph's weights and computation."""

WEIGHT_BYTES = {"fp64": 8, "fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
"""Bytes of a weight by its precision; files may have fp64, too."""

WeightFormat = Literal["", "int8", "int4"]
"""How the matrices of transformers and text encoders are stored: "" in their graph's precision, else in so many bits (weight-only
quantization). Products compute in the graph's precision."""

LEAST_CONTRAST = 2.0
"""Minimum standard deviation of an image, in steps of 1/255. Images below are constant or black, as NaNs decode to."""


@dataclass(frozen=True, slots=True)
class AccuracyLimits:
    """Limits of one precision.

    Of a graph's outputs: `relative_error` is the L2 norm of the difference divided by that of the reference, `worst` the largest
    single difference divided by the root mean square of the reference. Of a finished image: `max_abs_error` in steps of 1/255,
    and the minima `psnr_db` and `ssim`.
    """

    relative_error: float
    worst: float
    max_abs_error: int
    psnr_db: float
    ssim: float


LIMITS: dict[Precision, AccuracyLimits] = {
    # Both sides are fp32 (epsilon 6e-8) and differ only in the order of sums. Through hundreds of layers this grows to about
    # 1e-6, while export faults (a frozen size, one timestep for all, a lost cast) cause 1e-2 and more. A value of the image may
    # then be rounded to the neighboring one.
    "fp32": AccuracyLimits(1e-4, 1e-3, 1, 50.0, 0.999),
    "fp16": AccuracyLimits(1e-2, 0.1, 255, 35.0, 0.98),
    "bf16": AccuracyLimits(5e-2, 0.5, 255, 25.0, 0.90),
    "int8": AccuracyLimits(1e-1, 1.0, 255, 22.0, 0.85),
}
"""The limits of each precision."""

WEIGHT_LIMITS: dict[WeightFormat, AccuracyLimits] = {
    "int8": AccuracyLimits(5e-2, 0.5, 255, 30.0, 0.95),
    # Rounding to 4 bits changes normally distributed weights by 8 to 10 %.
    "int4": AccuracyLimits(3e-1, 3.0, 255, 22.0, 0.85),
}
"""The limits of weight-only quantization."""


def limits_of(precision: Precision, weight_format: WeightFormat = "") -> AccuracyLimits:
    """The limits of a precision with weights in `weight_format`: of each number the looser one."""
    own, more = LIMITS[precision], WEIGHT_LIMITS.get(weight_format)
    if more is None:
        return own
    return AccuracyLimits(
        max(own.relative_error, more.relative_error),
        max(own.worst, more.worst),
        max(own.max_abs_error, more.max_abs_error),
        min(own.psnr_db, more.psnr_db),
        min(own.ssim, more.ssim),
    )


_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Source:
    """A model's source: exactly one of `repo_id` and `path`, and the selected files.

    `digest` is the SHA-256 over the names and contents of the files that were read; it shows whether a source has changed.
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
    """An input or output of a graph. A dynamic dimension is a name, a fixed one a number."""

    name: str
    type: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA that was fused into the weights: its file's name, the scale, and the file's SHA-256."""

    name: str
    scale: float
    digest: str


def is_text_encoder(component: str) -> bool:
    """Whether a component, or a graph of it, is a text encoder: diffusers names them so."""
    return "text_encoder" in component


def numbers_in_words(precision: str, weight_format: WeightFormat) -> str:
    """A precision with the format of quantized weights: "fp16, weights in int4"."""
    return f"{precision}, weights in {weight_format}" if weight_format else precision


@dataclass(frozen=True, slots=True)
class Component:
    """A component of the model. `precision` is that of its weights: fp32, fp16, bf16 or int8. A torch component has no graph.

    `reason` says why the precision differs from the requested one. The graph is `NAME/model.onnx`; `fused` is the path in the
    bundle of a second graph with ONNX Runtime's fused operators, or empty. `bytes` is the size of the weights.
    `lora`, `control` and `light` are the paths of its LoRA graph, and of a UNet's graphs for ControlNets and of its light graph
    (speedups.py); `fused_lora` and so on are those with fused operators. `kept_in_fp32` are the layers of a graph in static int8
    that stayed in fp32 because they were sensitive, the worst first. `weight_format` is "int8" or "int4" if matrices are
    quantized (weight-only); `precision` is then that of everything else. `image_prompts` says whether the graphs for ControlNets
    also take image prompts (image_prompts.py).
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
    kept_in_fp32: tuple[str, ...] = ()
    lora: str = ""
    fused_lora: str = ""
    light: str = ""
    fused_light: str = ""
    control: str = ""
    fused_control: str = ""
    control_lora: str = ""
    fused_control_lora: str = ""
    weight_format: WeightFormat = ""
    image_prompts: bool = False

    @property
    def numbers(self) -> str:
        """The precision and the weights' format, for people."""
        return numbers_in_words(self.precision, self.weight_format)


@dataclass(frozen=True, slots=True)
class ComponentParity:
    """The difference between a graph's output and PyTorch's in fp32 on the same input.

    `max_abs_error` is in the output's units, `relative_error` the L2 norm of the difference divided by the reference's. `graph`
    is "plain" or "fused".
    """

    component: str
    case: str
    max_abs_error: float
    relative_error: float
    passed: bool
    graph: str = "plain"


@dataclass(frozen=True, slots=True)
class ImageParity:
    """The difference between a finished image and the one that diffusers draws in fp32 with the same seed.

    `max_abs_error` is in steps of 1/255, `psnr_db` in decibels (999 for equal images), `ssim` the structural similarity, 1 for
    equal images.
    """

    case: str
    max_abs_error: int
    psnr_db: float
    passed: bool
    ssim: float = 1.0


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference image that diffusers drew in fp32 at export, and its request, for the server's accuracy check.

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
    """The results of the export's verification. A bundle that did not pass is served only with --allow-unverified.

    `problems` has a line for each failure; `limits` are the limits by name (`max_abs_error`, `relative_error`, `psnr_db`,
    `ssim`). `reference` names the program that it was compared with.
    """

    passed: bool
    components: tuple[ComponentParity, ...] = ()
    pictures: tuple[ImageParity, ...] = ()
    problems: tuple[str, ...] = ()
    limits: dict[str, float] = field(default_factory=dict)
    reference: str = "diffusers in fp32"


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that the server needs to know about a bundle before it opens other files.

    `pipeline_class` names diffusers' img2img class. `files` maps each file's path in the bundle to its SHA-256. `latent_preview`
    maps latents to colors, for previews: rows for red, green and blue (0 to 1), each with four weights per latent channel (see
    `features` in `runtime/diffusion/preview.py`) and a bias; () if there is no such map. `backend` is "hybrid" if only the
    denoiser is a graph and the rest runs in PyTorch; `backend_reason` says why it is not "onnx". `precision` is the requested
    one. `size_multiple` is the number of pixels of which width and height must be multiples, if the graphs need more than the
    pipeline's class. `references` are the reference images; () if the bundle was made without diffusers. `speedups` are what
    `--speedups` measured. `weight_format` is the requested format of matrices.
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
    speedups: Speedups = NONE
    weight_format: WeightFormat = ""
    format_version: int = FORMAT_VERSION

    @property
    def digest(self) -> str:
        """The SHA-256 over the names and contents of the bundle's files, in hexadecimal."""
        lines = (f"{digest}  {name}\n" for name, digest in sorted(self.files.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_manifest(bundle: Path, manifest: Manifest) -> None:
    """Writes `manifest` into the directory `bundle`, atomically and durably."""
    temporary = bundle / f".{MANIFEST_NAME}.part"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(dataclasses.asdict(manifest), file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(bundle / MANIFEST_NAME)


def read_manifest(bundle: Path) -> Manifest:
    """Reads the manifest of the directory `bundle`. Raises BundleError if it is missing, damaged or of another version."""
    path = bundle / MANIFEST_NAME
    try:
        data = read_json(path)
    except FileNotFoundError:
        raise BundleError(f"{bundle} is not a bundle: it has no {MANIFEST_NAME}") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read: {error}; export or copy the bundle again") from None
    if not isinstance(data, dict) or data.get("format_version") != FORMAT_VERSION:
        version = data.get("format_version") if isinstance(data, dict) else None
        raise BundleError(f"{path} has format version {version!r}, this server reads {FORMAT_VERSION}: export the model again")
    try:
        return _parse(Manifest, data, str(path))
    except BundleError as error:
        raise BundleError(f"{error}; export the model again") from None


def check_bundle(bundle: Path, manifest: Manifest, allow_unverified: bool = False) -> None:
    """Raises BundleError unless verification passed and every file exists with the verified contents.

    With `allow_unverified` the verification may have failed; the files are checked all the same.
    """
    if not manifest.verification.passed and not allow_unverified:
        why = "".join(f": {problem}" for problem in manifest.verification.problems[:1])
        raise BundleError(f"{bundle} did not pass verification at export{why}; --allow-unverified serves it")
    for name, expected in manifest.files.items():
        path = bundle / name
        if not path.resolve().is_relative_to(bundle.resolve()):
            raise BundleError(f"{bundle}/{MANIFEST_NAME} names a file outside the bundle: {name}")
        if not path.is_file():
            raise BundleError(f"{bundle} is incomplete: {name} is missing")
        if sha256_of(path) != expected:
            raise BundleError(f"{path} is not the file that was verified: its SHA-256 differs; export or copy it again")


def list_files(bundle: Path) -> list[str]:
    """The paths of all files except the manifest, relative to `bundle` and sorted."""
    return sorted(
        path.relative_to(bundle).as_posix()
        for path in bundle.rglob("*")
        if path.is_file() and not path.name.endswith(".part") and path != bundle / MANIFEST_NAME
    )


def digest_files(root: Path, names: Iterable[str]) -> dict[str, str]:
    """Maps each of `names`, paths relative to `root`, to the file's SHA-256."""
    return {name: sha256_of(root / name) for name in names}


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in lowercase hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse(kind: type[_T], data: Any, where: str) -> _T:
    """Makes a dataclass from JSON data. Raises BundleError for unknown, missing and wrongly typed keys."""
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
