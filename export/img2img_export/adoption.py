"""A directory that optimum-cli exported becomes a bundle: its graphs are verified as they are, and get a manifest.

Optimum's UNet graphs take one timestep for a whole batch and freeze the sizes of the upsamplers, so the server runs them whole,
one request at a time, at sizes that halve evenly. Without `--reference` there is no PyTorch model to compare with: then
optimum's own pipeline over the same graphs is the reference of the images.
"""

import dataclasses
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
from img2img_server.bundle.limits import LIMITS
from img2img_server.bundle.manifest import Component, ComponentParity, Verification

from img2img_export.attempts import Attempt, Drawn, draw, verify
from img2img_export.component import part_of, problems_of
from img2img_export.convert import models
from img2img_export.convert.external_weights import GRAPH_NAME
from img2img_export.convert.fp32_compute import computing_in_fp32
from img2img_export.convert.graphs import describe_graph, quiet
from img2img_export.convert.models import Loader, Plan
from img2img_export.errors import FAILURES, ExportError, first_line
from img2img_export.options import ExportOptions
from img2img_export.progress import Progress
from img2img_export.read.checkpoint import DENOISERS, Layout, read_index
from img2img_export.read.source import fill_tree, resolve
from img2img_export.verify import images
from img2img_export.verify.parity import compare, make_cases, open_graph

_SAME_GRAPHS = "optimum's pipeline over the same graphs"


def adopt(source: Path, layout: Layout, options: ExportOptions, bundle: Path, progress: Progress) -> Attempt:
    """Copies the export in `source` into the directory `bundle` and verifies it.

    Raises ExportError for an option that only an export of weights has, where there is nothing to compare with, where a class has
    no img2img pipeline here, or where a graph or an image is wrong.
    """
    if options.precision != "fp32" or options.backend not in ("auto", "onnx") or options.scheduler is not None:
        raise ExportError(f"{options.source} holds graphs already: --precision, --backend and --scheduler are for weights")
    if options.reference is None and not _has_optimum_onnx():
        raise ExportError(
            f"{options.source} holds graphs: give --reference with the model that they were exported from. (Without it, images "
            "are compared with those of optimum's own pipeline, which needs optimum-onnx beside the transformers 4 that it pins.)"
        )
    plan = models.plan(layout, "onnx")
    progress.stage("copying the graphs")
    shutil.copytree(source, bundle, dirs_exist_ok=True)
    names = sorted(path.parent.name for path in bundle.glob(f"*/{GRAPH_NAME}"))
    stock = any(_takes_one_timestep(bundle / name / GRAPH_NAME) for name in names if name in DENOISERS)
    if stock:
        plan = dataclasses.replace(plan, family=models.WHOLE, reason="its UNet takes one timestep for a whole batch")
    components = tuple(describe_graph(bundle, name) for name in names)
    multiple = _size_multiple(bundle) if stock else None
    if options.reference is None:
        drawn, verification = _draw_with_optimum(bundle, plan, progress), Verification(False, reference=_SAME_GRAPHS)
    else:
        drawn, verification = _compare_with(options, plan, components, stock, bundle, progress)
    progress.stage("comparing pictures drawn by the server's pipeline")
    draft = Attempt(plan, components, verification, size_multiple=multiple)
    return verify(draft, drawn.cases, drawn.references, options, bundle)


def _has_optimum_onnx() -> bool:
    try:
        return find_spec("optimum.onnxruntime") is not None
    except ModuleNotFoundError:
        return False


def _takes_one_timestep(graph: Path) -> bool:
    model = onnx.load(str(graph), load_external_data=False)
    return any(item.name == "timestep" and not item.type.tensor_type.shape.dim for item in model.graph.input)


def _size_multiple(bundle: Path) -> int:
    """Pixels that halve evenly in each level of the VAE and of the UNet."""
    levels = [len(read_index(bundle / name / "config.json")["block_out_channels"]) for name in ("unet", "vae_decoder")]
    return int(2 ** (sum(levels) - len(levels)))


def _draw_with_optimum(bundle: Path, plan: Plan, progress: Progress) -> Drawn:
    from optimum.onnxruntime import ORTPipelineForImage2Image

    try:
        with quiet():
            pipeline = ORTPipelineForImage2Image.from_pretrained(bundle, export=False, provider="CPUExecutionProvider")
            pipeline.set_progress_bar_config(disable=True)
    except FAILURES as error:
        raise ExportError(f"optimum cannot load what it exported: {type(error).__name__}: {first_line(error)}") from error
    cases = images.picture_cases(pipeline, plan.family)
    progress.stage(f"drawing {len(cases)} reference pictures with optimum")
    return Drawn(cases, tuple(images.draw_references(pipeline, cases)), {}, ())


def _compare_with(
    options: ExportOptions, plan: Plan, components: tuple[Component, ...], stock: bool, bundle: Path, progress: Progress
) -> tuple[Drawn, Verification]:
    """What diffusers draws with the model that the graphs were made of, and each graph's differences from it."""
    assert options.reference is not None, "the caller has looked"
    asked = dataclasses.replace(options, source=options.reference, reference=None)
    checkpoint = resolve(asked, progress)
    with tempfile.TemporaryDirectory(dir=bundle.parent) as folder:
        layout, _ = fill_tree(checkpoint, asked, Path(folder), progress)
        loader = Loader(Path(folder), layout, options.variant)
        drawn = draw(loader, plan, asked, progress)
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
