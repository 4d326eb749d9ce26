"""One component at a time: load it, trace it, write its graphs, compare them with it, and let it go.

A graph in half precision or int8 that does not compute what PyTorch does (the original VAE of SDXL overflows in fp16) is made
again in fp32, with what was measured as the reason. So which parts stay in fp32 is decided by the model at hand.
"""

import contextlib
import ctypes
import dataclasses
import gc
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from img2img_server.bundle.limits import LIMITS, Precision
from img2img_server.bundle.manifest import Component, ComponentParity

from img2img_export.convert import parts, split_graph
from img2img_export.convert.external_weights import GRAPH_NAME, Skeleton
from img2img_export.convert.fp32_compute import computing_in_fp32
from img2img_export.convert.fusion import fuse
from img2img_export.convert.graphs import describe_graph, quiet
from img2img_export.convert.models import Loader
from img2img_export.convert.parts import Part, Tensors
from img2img_export.convert.tracing import trace
from img2img_export.errors import FAILURES, ExportError, first_line
from img2img_export.options import ExportOptions
from img2img_export.progress import Progress
from img2img_export.read.checkpoint import DENOISERS
from img2img_export.verify.parity import Case, compare, make_cases, open_fused, open_graph, takes_any_size
from img2img_export.verify.recorded_inputs import VAE, Calls


def give_back() -> None:
    """Frees what only cycles hold, and returns to the system what the allocator keeps for later."""
    gc.collect()
    # glibc's own; another C library may not have it.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


_SMALL = {"unet": ("sample", (9, 11)), "vae_encoder": ("sample", (72, 88)), "vae_decoder": ("latent_sample", (9, 11))}
"""Inputs of another size than they were seen with, to trace with. Odd ones keep every size open, and small ones are quick."""

FUSED = "cuda"
"""The folder, in a graph's own, of the same graph in ONNX Runtime's fused operators for CUDA."""
_FUSABLE = ("unet", "vae_encoder", "vae_decoder")
"""The graphs that there are fusions for."""


@dataclasses.dataclass(frozen=True, slots=True)
class Made:
    """A graph in its place: its record, what was measured, and what of it did not pass."""

    component: Component
    parities: tuple[ComponentParity, ...]
    problems: tuple[str, ...] = ()


class Converter:
    """Makes the graphs of a checkpoint in the directory `bundle`. `calls` are what the pipeline gave to its parts."""

    def __init__(self, loader: Loader, calls: dict[str, Calls], options: ExportOptions, bundle: Path, progress: Progress) -> None:
        self._loader = loader
        self._calls = calls
        self._options = options
        self._bundle = bundle
        self._progress = progress

    def convert(self, component: str) -> Iterator[Made]:
        """The graphs of one component. Raises ExportError where one cannot be made, or is wrong and must not be published."""
        for name in ("vae_encoder", "vae_decoder") if component == VAE else (component,):
            yield self._convert(component, name)

    def _convert(self, component: str, name: str) -> Made:
        reason = ""
        wanted = self._options.precision
        if wanted == "int8" and component == VAE:
            wanted, reason = "fp32", "its convolutions are not quantized"
        made = self._attempt(component, name, wanted)
        if made.problems and wanted != "fp32":
            self._progress.stage(f"{name} stays in fp32: {made.problems[0]}")
            reason = made.problems[0]
            made = self._attempt(component, name, "fp32")
        if made.problems and not self._options.allow_unverified:
            raise ExportError(made.problems[0])
        reason = "; ".join(filter(None, (reason, made.component.reason)))
        return dataclasses.replace(made, component=dataclasses.replace(made.component, reason=reason))

    def _attempt(self, component: str, name: str, precision: Precision) -> Made:
        """Makes and compares one graph. A precision other than fp32 in which it cannot be made is a problem, not an error."""
        self._progress.stage(f"{name}: tracing in {precision}")
        shutil.rmtree(self._bundle / name, ignore_errors=True)
        try:
            part, cases, trouble = self._write(component, name, precision)
            give_back()
            self._progress.stage(f"{name}: comparing with PyTorch")
            parities = compare(part, open_graph(self._bundle / name / GRAPH_NAME), cases, LIMITS[precision])
        except ExportError as error:
            if precision == "fp32":
                raise
            return Made(Component(name, precision), (), (str(error),))
        record = describe_graph(self._bundle, name)
        problems = tuple(problems_of(parities))
        if name in DENOISERS and precision in ("fp32", "fp16"):
            split_graph.split(self._bundle / name)
        if (self._bundle / name / FUSED).is_dir() and not problems:
            fused, trouble = self._compare_fused(part, cases)
            parities += fused
            if fused:
                record = dataclasses.replace(record, fused=f"{name}/{FUSED}/{GRAPH_NAME}")
        return Made(dataclasses.replace(record, reason=trouble), tuple(parities), problems)

    def _compare_fused(self, part: Part, cases: list[Case]) -> tuple[list[ComponentParity], str]:
        """What was measured of the fused graph, if that passed. If not, the graph is gone, and why is the second."""
        folder = self._bundle / part.name / FUSED
        try:
            parities = compare(part, open_fused(folder / GRAPH_NAME), cases, LIMITS["fp16"], "fused")
            problems = list(problems_of(parities))
        except ExportError as error:
            parities, problems = [], [str(error)]
        if not problems:
            return parities, ""
        shutil.rmtree(folder)
        self._progress.stage(f"{part.name} has no fused graph: {problems[0]}")
        return [], f"no fused graph: {problems[0]}"

    def _write(self, component: str, name: str, precision: Precision) -> tuple[Part, list[Case], str]:
        """Writes the graphs and their configuration. The module is gone when this returns.

        The third is why there is no fused graph, where there could have been.
        """
        if name not in self._calls:
            raise ExportError(f"{name} is not called by the pipeline: there is nothing to trace it with")
        module = self._loader.component(component)
        calls = self._calls[name]
        folder = self._bundle / name
        trouble = ""
        with quiet():
            part = part_of(name, module, calls)
            _save_config(module, folder, self._options.precision)
            with computing_in_fp32(module):
                cases = make_cases(part, module, calls)
            skeleton = _make(module, part, _example(part, module, calls), precision)
        skeleton.write(folder, self._progress, name)
        if precision == "fp16" and name in _FUSABLE:
            try:
                fuse(skeleton).write(folder / FUSED, self._progress, f"{name}, fused")
            except FAILURES as error:
                shutil.rmtree(folder / FUSED, ignore_errors=True)
                trouble = f"no fused graph: {type(error).__name__}: {first_line(error)}"
        return part, cases, trouble


def part_of(name: str, module: Any, calls: Calls) -> Part:
    """What the graph `name` is to be. Raises ExportError where a graph can have no such inputs."""
    if calls.varying:
        raise ExportError(
            f"{name} is called with {' and '.join(calls.varying)} that are no tensors and vary: no graph has such inputs"
        )
    if name in DENOISERS:
        return parts.denoiser_part(name, module, calls.all(), calls.structure)
    if name.startswith("text_encoder"):
        return parts.text_part(name, module, bool(calls.structure.get("output_hidden_states")))
    return next(part for part in parts.vae_parts(module) if part.name == name)


def _example(part: Part, module: Any, calls: Calls) -> Tensors:
    """Inputs to trace with: two rows, and small where any size will do."""
    call = calls.two_sizes()[0]
    rows = len(next(iter(call.values())))
    example = {
        name: torch.cat([value, value])[:2] if value.ndim and len(value) == rows else value for name, value in call.items()
    }
    if part.name in _SMALL and (part.name != "unet" or takes_any_size(module)):
        name, size = _SMALL[part.name]
        example[name] = torch.randn(*example[name].shape[:2], *size)
    return example


def _make(module: Any, part: Part, example: Tensors, precision: Precision) -> Skeleton:
    if precision == "fp32":
        return trace(module, part, example)
    if precision == "int8":
        from img2img_export.convert.quantize import to_int8

        return to_int8(trace(module, part, example))
    skeleton = trace(module, part, example, torch.float16)
    if precision == "bf16":
        from img2img_export.convert.bfloat16 import to_bfloat16

        return to_bfloat16(skeleton)
    return skeleton


def _save_config(module: Any, folder: Path, asked: Precision) -> None:
    """The module's config.json, as it is beside its weights; `asked` is the bundle's precision."""
    if not hasattr(module, "save_config"):
        module.config.save_pretrained(folder)
        return
    if asked != "fp32" and module.config.get("force_upcast"):
        # Read by pipelines of optimum's, which would turn to layers that only a torch module has.
        module.register_to_config(force_upcast=False)
    module.save_config(folder)


def problems_of(parities: list[ComponentParity]) -> Iterator[str]:
    """In a line each, the worst first."""
    for part in sorted(parities, key=lambda part: -part.relative_error):
        if part.passed:
            continue
        if math.isinf(part.relative_error):
            found = "values that are not finite, or a shape of its own"
        else:
            found = f"relative error {part.relative_error:.2e}, greatest {part.max_abs_error:.2e}"
        yield f"{part.component} differs from PyTorch ({part.case}): {found}"
