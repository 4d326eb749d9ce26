"""Converts one component at a time: loads it, traces it, writes its graphs, compares them with it, and frees it.

A graph in half precision or int8 that differs from PyTorch (the original VAE of SDXL overflows in fp16) is made again in fp32,
with the measurement as the reason. So the measurements decide which parts stay in fp32.

In int8, UNets and the VAE's decoder are quantized statically (calibration.py), the matrices of other graphs dynamically
(quantize.py), and the VAE's encoder stays in fp32. Weight-only quantization (weight_only.py) applies to transformers and text
encoders.
"""

import contextlib
import ctypes
import dataclasses
import functools
import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from img2img_server.bundle import controls, image_encoders
from img2img_server.bundle.adapters import LORA_NAME, AdaptedLayer
from img2img_server.bundle.image_prompts import STATES
from img2img_server.bundle.manifest import (
    AccuracyLimits,
    Component,
    ComponentParity,
    Precision,
    WeightFormat,
    limits_of,
    numbers_in_words,
)
from img2img_server.bundle.speedups import LIGHT_NAME
from img2img_server.runtime.common.fp32_compute import computing_in_fp32
from img2img_server.runtime.common.vae import LATENT_STATISTICS
from img2img_server.runtime.onnx.vision import TOWER

from img2img_export.convert import light_graph, lora_graph, parts, split_graph
from img2img_export.convert.calibration import Calibration
from img2img_export.convert.external_weights import GRAPH_NAME, ExternalWeightsGraph
from img2img_export.convert.flux_control import FluxControlNet
from img2img_export.convert.fused_attention import NAME as FUSED_ATTENTION
from img2img_export.convert.fused_attention import name_of, write_beside
from img2img_export.convert.fusion import fuse
from img2img_export.convert.graph_kinds import LanguageModel
from img2img_export.convert.graphs import describe_graph, quiet
from img2img_export.convert.making import STATIC_GRAPHS
from img2img_export.convert.making import make as make_graph
from img2img_export.convert.models import Loader
from img2img_export.convert.parts import Part, Tensors
from img2img_export.convert.static_int8 import to_static_int8
from img2img_export.convert.token_graphs import token_part
from img2img_export.errors import FAILURES, ExportError, first_line
from img2img_export.options import ExportOptions
from img2img_export.progress import Progress
from img2img_export.read.checkpoint import DENOISERS
from img2img_export.verify import control_cases, lora_cases, seeing_cases, token_cases, vision_cases
from img2img_export.verify.parity import (
    Case,
    compare,
    light_cases,
    make_cases,
    open_fused,
    open_graph,
    problems_of,
    takes_any_size,
)
from img2img_export.verify.recorded_inputs import VAE, Calls


def release_memory() -> None:
    """Collects reference cycles and returns free memory of the allocator to the system."""
    gc.collect()
    # Only glibc has malloc_trim.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


_SMALL = {"unet": ("sample", (9, 11)), "vae_encoder": ("sample", (72, 88)), "vae_decoder": ("latent_sample", (9, 11))}
"""Input sizes for tracing: odd, so that no size is frozen into the graph, and small, for speed."""

_TRACED_TOKENS = 13
"""The number of tokens to trace a language model with, which takes any number."""

STATIC = frozenset({"unet", VAE})
"""Components with graphs in static int8."""
_BUDGETS = (0.03, 0.015, 0.0075, 0.0)
"""Relative errors of a graph's output that static int8 may add, each tried if images with the one before are not good enough. 0:
the graph stays in fp32."""
_UNCALIBRATED = AccuracyLimits(0.5, 5.0, 255, 0.0, 0.0)
"""The limits of static int8 for random inputs, which lie outside of the calibrated ranges: they find faults of the graph only."""

FUSED = "cuda"
"""Subfolder of a graph's folder for the same graph with ONNX Runtime's fused CUDA operators."""
_FUSABLE = ("unet", "vae_encoder", "vae_decoder", controls.FAMILY)
"""The graphs that can be fused, apart from ControlNets of Flux."""
_TRANSFORMER = "transformer"
"""The graph with a second one whose attention is fused (fused_attention.py)."""
_COARSER: dict[WeightFormat, WeightFormat] = {"int4": "int8", "int8": ""}
"""The next weight format to try if a graph or images differ too much."""
_CONTROLLED = ("unet", _TRANSFORMER)
"""The components with control graphs."""


_FURTHER = {"lora": LORA_NAME, "control": controls.CONTROL_NAME, "control_lora": controls.CONTROL_LORA_NAME}
"""The further graphs of a component that share its weights: the manifest's field, and the file's name."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Further:
    """A further graph to make: its description, the inputs beside the plain graph's to trace it with, and its comparisons."""

    part: Part
    example: Tensors
    cases: list[Case]


@dataclasses.dataclass(frozen=True, slots=True)
class _Written:
    """The graphs of a part in its folder, and their comparisons. `further` describes those of _FURTHER by field; `trouble` is why
    one could not be made, or ""; `kept` are the layers that static int8 left in fp32; `light_cost` is that of a UNet's light
    graph, relative to the whole one, None if there is none."""

    part: Part
    cases: list[Case]
    further: dict[str, _Further] = dataclasses.field(default_factory=dict)
    trouble: str = ""
    kept: tuple[str, ...] = ()
    light_cost: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Made:
    """A written graph: its manifest entry, the measurements, and one message per failed comparison. `light_cost` is that of its
    light graph, relative to the whole one; 1 without one."""

    component: Component
    parities: tuple[ComponentParity, ...]
    problems: tuple[str, ...] = ()
    light_cost: float = 1.0


class Converter:
    """Makes the graphs of a checkpoint in the directory `bundle`. `calls` are the recorded inputs of the pipeline's parts. With
    `control_graphs` the denoiser also gets graphs for requests with ControlNets."""

    def __init__(
        self,
        loader: Loader,
        calls: dict[str, Calls],
        options: ExportOptions,
        bundle: Path,
        progress: Progress,
        control_graphs: bool = False,
    ) -> None:
        self._loader = loader
        self._calls = calls
        self._options = options
        self._bundle = bundle
        self._progress = progress
        self._control_graphs = control_graphs
        self._calibrations: dict[str, Calibration] = {}
        self._budget = 0
        self._format = options.weight_format
        self._narrow: dict[str, None] = {}

    @property
    def weight_format(self) -> WeightFormat:
        """The format of the narrowest weights among the graphs and modules; "" if none has quantized weights."""
        return self._format if self._narrow else ""

    @property
    def wanted_format(self) -> WeightFormat:
        """The narrowest format that is allowed now."""
        return self._format

    @property
    def coarsening(self) -> str:
        """Why weights are not in the format that was asked for; "" if they may be."""
        asked = self._options.weight_format
        return f"images differ too much with weights in {asked}" if self._format != asked else ""

    def count_module(self, name: str) -> None:
        """Has `tighten` name a component in PyTorch, too, whose weights were stored in `wanted_format`."""
        self._narrow[name] = None

    @property
    def is_strictest(self) -> bool:
        """Whether `tighten` would leave no graph in static int8, or there is none."""
        return not self._calibrations or self._budget + 2 >= len(_BUDGETS)

    def tighten(self) -> tuple[str, ...]:
        """Reduces the error that static int8 graphs may have, or stores weights in more bits. Returns the components to convert
        again; empty if no graph is quantized."""
        if self._narrow:
            again, self._narrow = tuple(self._narrow), {}
            self._format = _COARSER[self._format]
            return again
        made = tuple(self._calibrations)
        if not made or self._budget + 1 >= len(_BUDGETS):
            return ()
        self._budget += 1
        return tuple({VAE if name.startswith("vae_") else name: None for name in made})

    def convert(self, component: str) -> Iterator[Made]:
        """Makes the graphs of one component. Raises ExportError if one cannot be made, or fails and must not be published."""
        names = ("vae_encoder", "vae_decoder") if component == VAE else (component,)
        sees = component in self._calls and self._calls[component].has_images
        for name in (*names, TOWER) if sees else names:
            yield self._convert(component, name)

    def _convert(self, component: str, name: str) -> Made:
        reason = ""
        wanted = self._options.precision
        if wanted == "int8" and name == "vae_encoder":
            wanted, reason = "fp32", "the source image is encoded once, and in full precision"
        if wanted == "int8" and name in STATIC_GRAPHS and not _BUDGETS[self._budget]:
            wanted, reason = "fp32", "images differ too much in int8"
        can_be_narrow = name == _TRANSFORMER or (name.startswith("text_encoder") and name != TOWER)
        narrow: WeightFormat = self._format if can_be_narrow else ""
        reason = self.coarsening or reason
        made = self._attempt(component, name, wanted, narrow)
        while made.problems and narrow:
            narrow, failed = _COARSER[narrow], narrow
            reason = f"not in {failed}: {made.problems[0]}"
            self._progress.stage(f"{name}: weights {reason}")
            made = self._attempt(component, name, wanted, narrow)
        if narrow:
            self._narrow[component] = None
        if made.problems and wanted != "fp32":
            self._progress.stage(f"{name} stays in fp32: {made.problems[0]}")
            reason = made.problems[0]
            made = self._attempt(component, name, "fp32")
        if made.problems and not self._options.allow_unverified:
            raise ExportError(made.problems[0])
        reason = "; ".join(filter(None, (reason, made.component.reason)))
        return dataclasses.replace(made, component=dataclasses.replace(made.component, reason=reason))

    def _attempt(self, component: str, name: str, precision: Precision, narrow: WeightFormat = "") -> Made:
        """Makes and compares one graph, with weights in the format `narrow`. A failure with quantized weights, or in another
        precision than fp32, is a problem of the result, not an error."""
        self._progress.stage(f"{name}: tracing in {numbers_in_words(precision, narrow)}")
        limits = limits_of(precision, narrow)
        shutil.rmtree(self._bundle / name, ignore_errors=True)
        try:
            written = self._write(component, name, precision, narrow)
            release_memory()
            self._progress.stage(f"{name}: comparing with PyTorch")
            is_static = precision == "int8" and name in STATIC_GRAPHS
            session = open_graph(self._bundle / name / GRAPH_NAME)
            uncalibrated = _UNCALIBRATED if is_static else None
            parities = compare(written.part, session, written.cases, limits, random_limits=uncalibrated)
        except ExportError as error:
            if precision == "fp32" and not narrow:
                raise
            return Made(Component(name, precision), (), (str(error),))
        record = dataclasses.replace(describe_graph(self._bundle, name), weight_format=narrow)
        problems = tuple(problems_of(parities))
        if name in DENOISERS and precision in ("fp32", "fp16"):
            split_graph.split(self._bundle / name)
        reasons = [written.trouble] if written.trouble else []
        further: dict[str, Any] = {"kept_in_fp32": written.kept}
        folder = self._bundle / name
        graphs: dict[str, tuple[str, ...]] = {"fused": (f"{FUSED}/{GRAPH_NAME}", FUSED_ATTENTION)}
        for field, file in _FURTHER.items():
            graphs |= {field: (file,), f"fused_{field}": (f"{FUSED}/{file}", name_of(file))}
        graphs |= {"light": (LIGHT_NAME,), "fused_light": (f"{FUSED}/{LIGHT_NAME}",)}
        for field, files in graphs.items():
            path = next((folder / file for file in files if (folder / file).is_file()), None)
            if not problems and path is not None:
                found, reason = self._compare(written, field, path, precision, limits)
                parities += found
                further[field] = path.relative_to(self._bundle).as_posix() if found else ""
                reasons += [reason] if reason else []
        control = written.further.get("control")
        further["image_prompts"] = control is not None and bool(further.get("control")) and STATES in control.part.inputs
        cost = written.light_cost if further.get("light") and written.light_cost is not None else 1.0
        return Made(dataclasses.replace(record, reason="; ".join(reasons), **further), tuple(parities), problems, cost)

    def _compare(
        self, written: _Written, field: str, path: Path, precision: Precision, limits: AccuracyLimits
    ) -> tuple[list[ComponentParity], str]:
        """Compares a further graph. If it fails, the graph is removed, and the measurements are empty, with the reason."""
        expanded, words = field.startswith("fused") and written.part.name != _TRANSFORMER, field.replace("_", " ")
        further = written.further.get(field.removeprefix("fused_"))
        part, cases = (written.part, written.cases) if further is None else (further.part, further.cases)
        if "light" in field:
            # Random inputs lie outside of the ranges that int8 is calibrated for.
            known = [case for case in cases if not (case.is_random and precision == "int8")]
            part, cases = light_cases(part, known)
        try:
            session = open_fused(path) if expanded else open_graph(path)
            parities = compare(part, session, cases, limits, words)
            problems = list(problems_of(parities))
        except ExportError as error:
            parities, problems = [], [str(error)]
        if not problems:
            return parities, ""
        if field == "fused":
            _remove_fused(self._bundle / part.name)
        else:
            path.unlink()
        self._progress.stage(f"{part.name} has no {words} graph: {problems[0]}")
        return [], f"no {words} graph: {problems[0]}"

    def _write(self, component: str, name: str, precision: Precision, narrow: WeightFormat) -> _Written:
        """Writes the graphs and their configuration, and frees the module."""
        calls = self._calls.get(component if name == TOWER else name)
        if calls is None:
            raise ExportError(f"{name} was not called by the pipeline, so no inputs were recorded to trace it with")
        module = self._loader.component(component)
        folder = self._bundle / name
        # int8 weights would differ in scale from those of the plain graph.
        layers = lora_graph.layers_of(module) if self._options.lora_graphs and precision != "int8" else ()
        beside: dict[str, ExternalWeightsGraph] = {}
        troubles = []
        with quiet():
            _save_config(module, folder, self._options.precision)
            with computing_in_fp32(module):
                part, example, cases, cost = self._described(name, module, calls)
                has_controls = self._control_graphs and name in _CONTROLLED and precision != "int8"
                further = _further(part, module, example, cases, layers, has_controls)
            module = parts.traced(module)
            make = functools.partial(make_graph, module, precision=precision, narrow=narrow, group_size=self._options.group_size)
            external = make(part, example)
            for field, wanted in further.items():
                try:
                    beside[_FURTHER[field]] = make(wanted.part, example | wanted.example)
                except ExportError as error:
                    troubles.append(f"no {field.replace('_', ' ')} graph: {error}")
            kept: tuple[str, ...] = ()
            if precision == "int8" and name in STATIC_GRAPHS:
                with computing_in_fp32(module):
                    external, kept = self._quantized(external, module, part, calls)
            beside |= _light(external, module, cost)
        external.write(folder, self._progress, name, beside)
        if name in self._calibrations:
            self._calibrations[name].release()
        try:
            if precision == "fp16" and name in _FUSABLE and not isinstance(part.kind, FluxControlNet):
                fused = {file: fuse(graph) for file, graph in beside.items()}
                fuse(external).write(folder / FUSED, self._progress, f"{name}, fused", fused)
            elif precision != "int8" and name == _TRANSFORMER:
                made = {_FURTHER[field]: more for field, more in further.items() if _FURTHER[field] in beside}
                with quiet():
                    for file, graph in {GRAPH_NAME: _Further(part, {}, []), **made}.items():
                        write_beside(make(graph.part, example | graph.example, fused_attention=True), folder, name_of(file))
        except (*FAILURES, ExportError) as error:
            _remove_fused(folder)
            troubles.append(f"no fused graph: {type(error).__name__}: {first_line(error)}")
        return _Written(part, cases, further, "; ".join(troubles), kept, cost)

    def _described(self, name: str, module: Any, calls: Calls) -> tuple[Part, Tensors, list[Case], float | None]:
        """The results of `described`, and the cost of the light graph, None without one; with one, the graph has the deep
        features as an output."""
        part, example, cases = described(name, module, calls)
        if not self._options.speedups or not light_graph.has_light_graph(module):
            return part, example, cases, None
        cost = light_graph.light_cost(module, part, example)
        part = light_graph.with_features(part, module)
        if calls.rows:
            return part, example, token_cases.make_cases(part, token_part(name, module)[1], module, calls), cost
        return part, example, make_cases(part, module, calls), cost

    def _quantized(
        self, graph: ExternalWeightsGraph, module: Any, part: Part, calls: Calls
    ) -> tuple[ExternalWeightsGraph, tuple[str, ...]]:
        """The graph in static int8, and the layers that stay in fp32. Raises ExportError if all do."""
        weights = {id(weight.source) for weight in graph.weights.values()}
        known = self._calibrations.pop(part.name, None)
        calibration = Calibration(module, part, calls.every(), weights, self._progress, known)
        choice = calibration.choose(module, _BUDGETS[self._budget])
        if not choice.layers:
            raise ExportError(f"{part.name} differs from PyTorch by more than {_BUDGETS[self._budget]:g} with any layer in int8")
        quantized, per_channel, kept = len(choice.layers), sum(choice.layers.values()), len(choice.kept)
        self._progress.stage(
            f"{part.name}: {quantized} layers in int8 ({per_channel} of them with a scale for each channel), {kept} in fp32, "
            f"relative error {choice.error:.1e}"
        )
        result = to_static_int8(
            graph, {name: (calibration.layers[name], per_channel) for name, per_channel in choice.layers.items()}
        )
        self._calibrations[part.name] = calibration
        return result, choice.kept


def _light(graph: ExternalWeightsGraph, module: Any, cost: float | None) -> dict[str, ExternalWeightsGraph]:
    """The light graph of a graph of `module`, by its file's name; empty if it has no `cost`."""
    return {} if cost is None else {LIGHT_NAME: light_graph.cut(graph, module)}


def _further(
    part: Part, module: Any, example: Tensors, cases: list[Case], layers: tuple[AdaptedLayer, ...], has_controls: bool
) -> dict[str, _Further]:
    """The further graphs of a part, by their field: with the `layers` that LoRAs adapt, with residuals of ControlNets, and with
    both. The module must compute in fp32."""
    rows = len(next(iter(example.values())))
    adapters = lora_graph.example_inputs(layers, rows)
    made: dict[str, _Further] = {}
    largest = sorted(cases, key=lambda case: len(next(iter(case.inputs.values()))))[-2:]
    if layers:
        lora = lora_graph.adapted(part, layers)
        made["lora"] = _Further(lora, adapters, lora_cases.lora_cases(part, module, layers, largest))
    if has_controls:
        control, residuals, case = control_cases.residual_case(part, module, example, largest[-1])
        made["control"] = _Further(control, residuals, [case])
        if layers:
            both = lora_graph.adapted(control, layers)
            made["control_lora"] = _Further(both, residuals | adapters, lora_cases.lora_cases(control, module, layers, [case]))
    return made


def described(name: str, module: Any, calls: Calls) -> tuple[Part, Tensors, list[Case]]:
    """The graph `name`, inputs to trace it with, and its comparisons; the module must compute in fp32.

    Raises ExportError if its inputs are not possible for a graph.
    """
    if name == image_encoders.FAMILY:
        return vision_cases.described(module)
    if name == controls.FAMILY:
        return control_cases.described(module, *_SMALL["unet"][1])
    if calls.has_images:
        return seeing_cases.described(name, module, calls)
    if calls.rows:
        part, kind = token_part(name, module)
        return part, token_cases.example(part, kind), token_cases.make_cases(part, kind, module, calls)
    part = part_of(name, module, calls)
    return part, _example(part, module, calls), make_cases(part, module, calls)


def part_of(name: str, module: Any, calls: Calls) -> Part:
    """Describes the graph `name`. Raises ExportError if its inputs are not possible for a graph."""
    if calls.varying:
        raise ExportError(
            f"{name} is called with varying non-tensor arguments ({', '.join(calls.varying)}), which a graph cannot have"
        )
    if name in DENOISERS:
        return parts.denoiser_part(name, module, calls.all(), calls.structure)
    if name.startswith("text_encoder"):
        masked = isinstance(calls.structure.get("attention_mask"), torch.Tensor)
        shows_states = bool(calls.structure.get("output_hidden_states"))
        return parts.text_part(name, module, shows_states, masked, sorted(calls.states))
    return next(part for part in parts.vae_parts(module) if part.name == name)


def _example(part: Part, module: Any, calls: Calls) -> Tensors:
    """Inputs to trace with: two rows, and a small size if the part takes any size.

    For a transformer it is the smaller of the sizes that are compared: a number of tokens that tracing freezes can serve fewer.
    """
    sizes = calls.two_sizes()
    call = sizes[0] if part.name == "unet" else min(sizes, key=lambda call: next(iter(call.values()))[0].numel())
    rows = len(next(iter(call.values())))
    example = {
        name: torch.cat([value, value])[:2] if value.ndim and len(value) == rows else value for name, value in call.items()
    }
    if isinstance(part.kind, LanguageModel):
        return {name: value[:, :_TRACED_TOKENS] for name, value in example.items()}
    if part.name in _SMALL and (part.name != "unet" or takes_any_size(module)):
        name, size = _SMALL[part.name]
        example[name] = torch.randn(*example[name].shape[:2], *size)
    return example


def _remove_fused(folder: Path) -> None:
    shutil.rmtree(folder / FUSED, ignore_errors=True)
    for file in (FUSED_ATTENTION, *map(name_of, _FURTHER.values())):
        (folder / file).unlink(missing_ok=True)


def _save_config(module: Any, folder: Path, requested: Precision) -> None:
    """Writes the module's config.json into `folder`; `requested` is the bundle's precision. A VAE's statistics of latents, which
    pipelines read (FLUX.2), are in it."""
    if not hasattr(module, "save_config"):
        module.config.save_pretrained(folder)
        return
    if requested != "fp32" and module.config.get("force_upcast"):
        # Optimum's pipelines read it, and would then access layers that only a torch module has.
        module.register_to_config(force_upcast=False)
    if (norm := getattr(module, "bn", None)) is not None:
        module.register_to_config(**{name: getattr(norm, name).tolist() for name in LATENT_STATISTICS})
    module.save_config(folder)
