"""The export of a companion, such as a ControlNet: a bundle of its own with one graph, which requests to other models use.

Its graph is compared with PyTorch. No images are compared, since a companion alone makes none.
"""

import dataclasses
from pathlib import Path

from img2img_server.bundle.manifest import LIMITS

from img2img_export.attempts import Attempt, measured
from img2img_export.component import Converter
from img2img_export.convert.models import Loader, Plan
from img2img_export.errors import FAILURES, ExportError, first_line
from img2img_export.options import ExportOptions
from img2img_export.progress import Progress
from img2img_export.read.checkpoint import Layout
from img2img_export.verify.recorded_inputs import Calls


def make(source: Path, layout: Layout, options: ExportOptions, bundle: Path, progress: Progress) -> Attempt:
    """Fills the directory `bundle` with the graph of the companion in `source`. Raises ExportError."""
    planned = plan(layout)
    name = planned.family
    converter = Converter(Loader(source, layout, options.variant), {name: Calls({})}, options, bundle, progress)
    try:
        made = {part.component.name: part for part in converter.convert(name)}
    except FAILURES as error:
        raise ExportError(f"{name}: {type(error).__name__}: {first_line(error)}") from error
    found = measured(made)
    limits = {name: float(value) for name, value in dataclasses.asdict(LIMITS[options.precision]).items()}
    verification = dataclasses.replace(found, passed=not found.problems, limits=limits, reference="PyTorch in fp32")
    return Attempt(planned, tuple(part.component for part in made.values()), verification)


def plan(layout: Layout) -> Plan:
    """The plan of a companion, whose only component has the name of its family."""
    (family,) = layout.components
    return Plan(layout.pipeline_class, family, "onnx", (family,))
