"""Makes a bundle of a directory exported by optimum-cli: its graphs are copied unchanged, verified and given a manifest.

Optimum's UNet graphs take one timestep per batch and have fixed upsampler sizes, so the server runs them as an opaque pipeline:
one request at a time, at sizes that are divisible at every level. Without `--reference` the graphs are not compared
with PyTorch, and the reference images come from optimum's own pipeline on the same graphs.
"""

import dataclasses
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
from img2img_server.bundle.manifest import LIMITS, Component, ComponentParity, Verification
from img2img_server.runtime.common.fp32_compute import computing_in_fp32

from img2img_export.attempts import Attempt, Drawn, draw, verify
from img2img_export.component import part_of
from img2img_export.convert import models
from img2img_export.convert.external_weights import GRAPH_NAME
from img2img_export.convert.graphs import describe_graph, quiet
from img2img_export.convert.models import Loader, Plan
from img2img_export.errors import FAILURES, ExportError, first_line
from img2img_export.options import ExportOptions
from img2img_export.progress import Progress
from img2img_export.read.checkpoint import DENOISERS, Layout, read_index
from img2img_export.read.source import fill_tree, resolve
from img2img_export.verify import images
from img2img_export.verify.parity import compare, make_cases, open_graph, problems_of

_SAME_GRAPHS = "optimum's pipeline over the same graphs"


def adopt(source: Path, layout: Layout, options: ExportOptions, bundle: Path, progress: Progress) -> Attempt:
    """Copies the export in `source` into the directory `bundle` and verifies it.

    Raises ExportError for an option that applies only to PyTorch weights, without a reference to compare with, if the
    pipeline class has no image-to-image counterpart, or if a graph or an image fails verification.
    """
    if options.precision != "fp32" or options.backend not in ("auto", "onnx") or options.scheduler is not None:
        raise ExportError(
            f"{options.source} already holds ONNX graphs: --precision, --backend and --scheduler apply to PyTorch weights only"
        )
    if options.reference is None and not _has_optimum_onnx():
        raise ExportError(
            f"{options.source} holds ONNX graphs: pass --reference with the model they were exported from (without it, images "
            "are compared with those of optimum's pipeline, which needs optimum-onnx and the transformers 4 release it requires)"
        )
    plan = models.plan(layout, "onnx")
    progress.stage("copying the graphs")
    shutil.copytree(source, bundle, dirs_exist_ok=True)
    names = sorted(path.parent.name for path in bundle.glob(f"*/{GRAPH_NAME}"))
    stock = any(_takes_one_timestep(bundle / name / GRAPH_NAME) for name in names if name in DENOISERS)
    if stock:
        plan = dataclasses.replace(plan, family=models.WHOLE, reason="its UNet takes one timestep per batch")
    components = tuple(describe_graph(bundle, name) for name in names)
    multiple = _size_multiple(bundle) if stock else None
    if options.reference is None:
        drawn, verification = _draw_with_optimum(bundle, plan, progress), Verification(False, reference=_SAME_GRAPHS)
    else:
        drawn, verification = _compare_with(options, plan, components, stock, bundle, progress)
    progress.stage("comparing images from the server's pipeline with the references")
    attempt = Attempt(plan, components, verification, size_multiple=multiple)
    return verify(attempt, drawn.cases, drawn.references, options, bundle)


def _has_optimum_onnx() -> bool:
    try:
        return find_spec("optimum.onnxruntime") is not None
    except ModuleNotFoundError:
        return False


def _takes_one_timestep(graph: Path) -> bool:
    model = onnx.load(str(graph), load_external_data=False)
    return any(item.name == "timestep" and not item.type.tensor_type.shape.dim for item in model.graph.input)


def _size_multiple(bundle: Path) -> int:
    """The pixel multiple that is divisible at every level of the VAE and the UNet."""
    levels = [len(read_index(bundle / name / "config.json")["block_out_channels"]) for name in ("unet", "vae_decoder")]
    return int(2 ** (sum(levels) - len(levels)))


def _draw_with_optimum(bundle: Path, plan: Plan, progress: Progress) -> Drawn:
    from optimum.onnxruntime import ORTPipelineForImage2Image

    try:
        with quiet():
            pipeline = ORTPipelineForImage2Image.from_pretrained(bundle, export=False, provider="CPUExecutionProvider")
            pipeline.set_progress_bar_config(disable=True)
    except FAILURES as error:
        raise ExportError(f"optimum cannot load its own export: {type(error).__name__}: {first_line(error)}") from error
    cases = images.image_cases(pipeline, plan.family)
    progress.stage(f"generating {len(cases)} reference images with optimum")
    return Drawn(cases, tuple(images.make_references(pipeline, cases)), {}, ())


def _compare_with(
    options: ExportOptions, plan: Plan, components: tuple[Component, ...], stock: bool, bundle: Path, progress: Progress
) -> tuple[Drawn, Verification]:
    """Generates the references with the model that the graphs were made from, and compares each graph with it."""
    assert options.reference is not None, "checked by the caller"
    asked = dataclasses.replace(options, source=options.reference, reference=None)
    checkpoint = resolve(asked, progress)
    with tempfile.TemporaryDirectory(dir=bundle.parent) as folder:
        layout, _ = fill_tree(checkpoint, asked, Path(folder), progress)
        loader = Loader(Path(folder), layout, options.variant)
        drawn = draw(loader, plan, asked, progress, ours=False)
        parities: list[ComponentParity] = []
        for component in components:
            progress.stage(f"{component.name}: comparing with PyTorch")
            parities += _compare(component.name, loader, drawn, stock, bundle)
    problems = tuple(problems_of(parities))
    if problems and not options.allow_unverified:
        raise ExportError(problems[0])
    return drawn, Verification(False, tuple(parities), problems=problems)


def _compare(name: str, loader: Loader, drawn: Drawn, stock: bool, bundle: Path) -> list[ComponentParity]:
    module: Any = loader.component("vae" if name.startswith("vae_") else name)
    with quiet(), computing_in_fp32(module):
        part = part_of(name, module, drawn.calls[name])
        cases = make_cases(part, module, drawn.calls[name], stock)
    return compare(part, open_graph(bundle / name / GRAPH_NAME), cases, LIMITS["fp32"])
