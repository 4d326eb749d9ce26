"""Options of TensorRT's sessions, as pure functions of settings and manifests. Not yet run on a GPU.

The options are documented in ONNX Runtime 1.31's tensorrt_execution_provider_info.cc and tensorrt_provider_options.h. An engine
is built into an "EP context" file: a graph of a single node that names the engine's file beside it. Such a graph is never rebuilt
silently: it fails for shapes that it was not built for.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from img2img_server.bundle.manifest import Component, Manifest
from img2img_server.errors import BundleError
from img2img_server.runtime.execution import Bucket
from img2img_server.runtime.onnx.runners import Runner

CONTEXT = "model_ctx.onnx"
"""The file that a session opens instead of the graph."""
COMPONENTS = ("unet", "vae_decoder")
"""The components with engines: they take nearly all the time. The others run on CUDA."""

_MOST_ROWS = 8
"""Maximum rows of a call that engines are built for by default: four guided images."""
_WORKSPACE = 4 * 2**30
"""Maximum scratch memory of a kernel in bytes: it is allocated while the server has most of the GPU's memory."""
_LARGE = 3 * 2**29
"""Bytes of weights above which they are passed separately: a graph with its weights must be less than 2 GiB."""
_FORMAT = 1

Axes = Callable[[str, Sequence[Any], Bucket], Mapping[str, int] | None]
"""The size of each dynamic axis in a component's inputs, None if one is unknown: graph_sizes.Sizes.axes."""
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Profile:
    """The calls that an engine supports: sizes from `least` to `most`, optimized for `best`."""

    least: Bucket
    best: Bucket
    most: Bucket

    @classmethod
    def of(cls, buckets: Sequence[Bucket] | None, native: Bucket) -> "Profile | None":
        """The profile that covers all `buckets`, optimized for the first; None if there are none.

        For `buckets` None it covers the model's `native` size, from one row up.
        """
        if buckets is None:
            most = dataclasses.replace(native, rows=max(native.rows, _MOST_ROWS))
            return cls(dataclasses.replace(native, rows=1), native, most)
        if not buckets:
            return None
        widths, heights = [bucket.width for bucket in buckets], [bucket.height for bucket in buckets]
        most = Bucket(max(widths), max(heights), max(bucket.rows for bucket in buckets))
        return cls(Bucket(min(widths), min(heights), 1), buckets[0], most)


@dataclass(frozen=True, slots=True)
class Range:
    """The shapes that an engine supports for one input."""

    least: Shape
    best: Shape
    most: Shape

    def holds(self, shape: Sequence[int]) -> bool:
        """Whether `shape` is supported."""
        return all(low <= side <= high for low, side, high in zip(self.least, shape, self.most, strict=True))


Ranges = dict[str, Range]
"""The range of each input with dynamic axes, by name."""


def ranges(component: Component, profile: Profile, axes: Axes) -> Ranges:
    """The ranges of a component's inputs. Raises BundleError if the size of an axis is unknown."""
    shapes = []
    for bucket in (profile.least, profile.best, profile.most):
        sizes = axes(component.name, component.inputs, bucket)
        if sizes is None:
            raise BundleError(f"{component.name} has inputs of unknown sizes, so TensorRT cannot build an engine for it")
        shapes.append(
            {item.name: tuple(sizes[axis] if isinstance(axis, str) else axis for axis in item.shape) for item in component.inputs}
        )
    varying = [item.name for item in component.inputs if any(isinstance(axis, str) for axis in item.shape)]
    return {name: Range(*(shape[name] for shape in shapes)) for name in varying}


def build_options(component: Component, allowed: Ranges, gpu_memory: int | None = None) -> dict[str, str]:
    """The provider's options for building an engine. They are part of its cache key.

    Paths are relative to the current directory of the building process, as the provider requires.
    """
    options = {
        "trt_profile_min_shapes": _spell({name: item.least for name, item in allowed.items()}),
        "trt_profile_opt_shapes": _spell({name: item.best for name, item in allowed.items()}),
        "trt_profile_max_shapes": _spell({name: item.most for name, item in allowed.items()}),
        "trt_max_workspace_size": str(min(_WORKSPACE, gpu_memory or _WORKSPACE)),
        "trt_engine_cache_enable": "1",
        "trt_dump_ep_context_model": "1",
        "trt_ep_context_file_path": CONTEXT,
        "trt_ep_context_embed_mode": "0",
    }
    if component.precision in ("fp16", "bf16"):
        options[f"trt_{component.precision}_enable"] = "1"
    if component.bytes > _LARGE:
        options["trt_load_user_initializer"] = "1"
    return options


def timing_options(folder: str) -> dict[str, str]:
    """Options that keep kernel timings in `folder`, to speed up later builds. They do not change the engine."""
    return {"trt_timing_cache_enable": "1", "trt_timing_cache_path": folder}


def serving_options(stream: int | None) -> tuple[tuple[str, str], ...]:
    """Options for opening a built engine. `stream` is the address of the CUDA stream that it shares with torch.

    CUDA graphs (trt_cuda_graph_enable) are off: the engine supports many shapes, and whether this provider keeps a recording for
    each was not tested.
    """
    return () if stream is None else (("has_user_compute_stream", "1"), ("user_compute_stream", str(stream)))


def key(component: Component, manifest: Manifest, options: Mapping[str, str], machine: Mapping[str, str]) -> dict[str, Any]:
    """The cache key of an engine: build options, machine, and the digests of the component's files."""
    files = {name: digest for name, digest in manifest.files.items() if name.startswith(f"{component.name}/")}
    return {"format": _FORMAT, "kind": "engine", "machine": dict(machine), "options": dict(options), "files": files}


def timing_key(machine: Mapping[str, str]) -> dict[str, Any]:
    """The cache key of kernel timings, the same for all models."""
    return {"format": _FORMAT, "kind": "timing", "machine": dict(machine)}


class RangedRunner:
    """Runs a graph on its engine if the engine supports the shapes, else on `other`."""

    def __init__(self, engine: Runner, other: Runner, allowed: Ranges) -> None:
        self._engine = engine
        self._other = other
        self._allowed = allowed
        self.inputs: Sequence[Any] = other.inputs
        self.outputs: Sequence[Any] = other.outputs

    def run(self, feed: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Runs the graph. See Runner.run."""
        takes = all(allowed.holds(feed[name].shape) for name, allowed in self._allowed.items())
        return (self._engine if takes else self._other).run(feed)


def _spell(shapes: Mapping[str, Shape]) -> str:
    """Shapes in the provider's syntax: "sample:1x4x64x64,timestep:1"."""
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
