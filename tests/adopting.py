"""Exports a directory of graphs that were exported elsewhere."""

from pathlib import Path

from img2img_export.build import Outcome, export_model
from img2img_export.options import ExportOptions


def adopt(exported: Path, output: Path, reference: Path | None = None) -> Outcome:
    """Makes a bundle of the directory. `reference` is the model that it was exported from."""
    return export_model(ExportOptions(source=str(exported), output=output, reference=str(reference) if reference else None))
