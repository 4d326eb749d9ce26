"""Comparisons of a graph of tokens with diffusers' own module, which gets each row alone and unpadded.

Rows of a batch differ in their timestep, in the layout of image and references and, if texts have a mask, in the text's length.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from img2img_server.bundle.speedups import FEATURES
from img2img_server.runtime.onnx import token_graphs

from img2img_export.convert.light_graph import watching
from img2img_export.convert.parts import Part, Tensors
from img2img_export.convert.token_graphs import Layout, TokenKind
from img2img_export.errors import FAILURES, ExportError, first_line
from img2img_export.verify.parity import Case
from img2img_export.verify.recorded_inputs import Calls

_LAYOUTS = {
    "one row": (Layout(23, ((8, 5), (3, 3))),),
    "no reference": (Layout(37, ((9, 13),)),),
    "equal counts, other layouts": (
        Layout(5, ((4, 6), (4, 6))),
        Layout(40, ((8, 3), (2, 6), (3, 4))),
        Layout(17, ((2, 12), (6, 4))),
    ),
}
"""Rows of the random cases. All rows of a batch have the same number of image tokens."""

_TRACED = (Layout(7, ((4, 4), (3, 2))), Layout(7, ((2, 8), (1, 6))))
"""Rows to trace with: unlike those compared."""

_TIMESTEPS = (0.93, 0.41, 0.07)
_TEXT = 11
"""Tokens of the texts in a batch, if texts have no mask."""


def example(part: Part, kind: TokenKind) -> Tensors:
    """Inputs to trace with."""
    return _inputs(part, kind, list(_rows(kind, _TRACED)))


def make_cases(part: Part, kind: TokenKind, module: Any, calls: Calls) -> list[Case]:
    """Makes the comparisons; the module must compute in fp32. `calls` are recorded calls of the module. If the part has the
    features of a light graph (`light_graph.py`), they are compared, too."""
    batches = {f"random, {name}": list(_rows(kind, layouts)) for name, layouts in _LAYOUTS.items()}
    for number, row in enumerate((calls.rows[0], calls.rows[-1])):
        batches[f"real, {('first', 'last')[number]} call"] = [row]
    cases = []
    for name, rows in batches.items():
        try:
            with torch.no_grad():
                references = [_reference(part, kind, module, row) for row in rows]
        except FAILURES as error:
            raise ExportError(f"{part.name} cannot run {name}: {type(error).__name__}: {first_line(error)}") from error
        expected = {
            output: torch.stack(found).float().numpy()
            for output, found in zip(part.outputs, zip(*references, strict=True), strict=True)
        }
        cases.append(Case(name, _inputs(part, kind, rows), expected, name.startswith("random"), padded=True))
    return cases


def _reference(part: Part, kind: TokenKind, module: Any, row: dict[str, Any]) -> list[torch.Tensor]:
    """The outputs of the part for a call of one row, by diffusers' own `forward`."""
    if FEATURES not in part.outputs:
        return [kind.reference(module, row)]
    with watching(module) as seen:
        return [kind.reference(module, row), seen.features[0]]


def _rows(kind: TokenKind, layouts: Sequence[Layout]) -> Iterator[dict[str, Any]]:
    generator = torch.Generator("cpu").manual_seed(len(layouts))
    for layout, timestep in zip(layouts, _TIMESTEPS, strict=False):
        masked = "text_mask" in kind.inputs or len(layouts) == 1
        yield kind.example(layout if masked else layout._replace(text=_TEXT), timestep, generator)


def _inputs(part: Part, kind: TokenKind, rows: list[dict[str, Any]]) -> Tensors:
    joined = token_graphs.join([kind.graph.inputs(row) for row in rows])
    return {name: joined[name] for name in part.inputs}
