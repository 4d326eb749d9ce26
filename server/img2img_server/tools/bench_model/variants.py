"""What `img2img bench-model` measures: each part and a whole step of a bundle, for every size and number of rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from img2img_server.bundle.manifest import Manifest
from img2img_server.engine.request import Pipeline
from img2img_server.tools.bench_model.measuring import (
    FAILURES,
    PEAK,
    STEP,
    CapturedCall,
    Product,
    StepWork,
    TimedCase,
    arithmetic_of,
    capture,
    requests_of,
)
from img2img_server.tools.bench_model.operations import Operations, Uncounted

_DENOISERS = ("unet", "transformer")
_GUIDANCE = 7.5
_ANY_SIZE = (0, 0)
"""The size of what does not depend on it."""
_ON_GPU = ("tensorrt", "cuda")

Tell = Callable[[str], None]
"""Told what is left out, and why, in a line."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What to measure of the bundle in `folder`. `sizes` are widths and heights in pixels; `exact` is arithmetic in fp32."""

    folder: Path
    manifest: Manifest
    sizes: Sequence[tuple[int, int]]
    rows: Sequence[int]
    threads: int
    exact: bool = False


def cases_of(provider: str, pipeline: Pipeline, asked: Selection, tell: Tell) -> list[TimedCase]:
    """All of one provider, each run once. What fails is told, and left out."""
    cases: list[TimedCase] = []
    for size in asked.sizes:
        for rows in asked.rows:
            where = f"{provider}, {size[0]} x {size[1]}, {rows} rows"
            if pipeline.max_rows is not None and rows > pipeline.max_rows:
                tell(f"{where}: left out, this model takes {pipeline.max_rows} in a call")
                continue
            tell(f"warming up: {where}")
            try:
                found = [*_parts(provider, pipeline, asked, size, rows), _step(provider, pipeline, asked, size, rows)]
            except FAILURES as error:
                tell(f"{where}: left out: {type(error).__name__}: {error}")
                continue
            # A text encoder has nothing to do with an image's size: once is enough.
            known = {(case.component, case.rows) for case in cases if case.size == _ANY_SIZE}
            cases += [case for case in found if case.size != _ANY_SIZE or (case.component, case.rows) not in known]
    return cases


def count(cases: Sequence[TimedCase], asked: Selection, tell: Tell) -> None:
    """Fills in the operations of parts that are graphs, and of steps that call one. What can't be counted is told."""
    known: dict[str, Operations] = {}
    for case in cases:
        if not isinstance(case.work, CapturedCall):
            continue
        if case.component not in known:
            graph = asked.folder / case.component / "model.onnx"
            try:
                known[case.component] = Operations.count(
                    graph, case.work.feed, pictures=case.component == "vae_encoder", threads=asked.threads
                )
            except Uncounted as error:
                tell(f"{case.component} is not counted: {error}")
                continue
        case.operations = known[case.component].at(_area(case.work)) * case.rows
    calls = {_place(case): case.operations for case in cases if case.component in _DENOISERS}
    for case in cases:
        if isinstance(case.work, StepWork) and case.work.shared:
            case.operations = calls.get(_place(case))


def peaks_of(cases: Sequence[TimedCase], threads: int) -> list[TimedCase]:
    """The matrix products that `cases` are to be compared with."""
    wanted = dict.fromkeys((device_of(case.provider), case.arithmetic) for case in cases if case.operations is not None)
    peaks = []
    for device, arithmetic in wanted:
        product = Product(device, arithmetic, threads)
        peaks.append(TimedCase(PEAK, device, product.size, 1, product, arithmetic, product.operations))
    return peaks


def device_of(provider: str) -> str:
    """Where a provider computes: "cuda" or "cpu"."""
    return "cuda" if provider in _ON_GPU and torch.cuda.is_available() else "cpu"


def _parts(provider: str, pipeline: Pipeline, asked: Selection, size: tuple[int, int], rows: int) -> list[TimedCase]:
    """The graphs, each called with as many rows as there are requests."""
    calls = capture(pipeline, requests_of(pipeline, size, rows, guidance=1.0, few_steps=True))
    return [
        TimedCase(
            name,
            provider,
            _ANY_SIZE if name.startswith("text_encoder") else size,
            len(next(iter(call.feed.values()))),
            call,
            _arithmetic(provider, name, asked),
        )
        for name, call in sorted(calls.items(), key=lambda item: _place_in(item[0]))
    ]


def _step(provider: str, pipeline: Pipeline, asked: Selection, size: tuple[int, int], rows: int) -> TimedCase:
    """A step of guided requests, as most requests are."""
    step = StepWork(pipeline, requests_of(pipeline, size, rows, _GUIDANCE))
    step.ready()
    denoiser = next((component.name for component in asked.manifest.components if component.name in _DENOISERS), "")
    return TimedCase(STEP, provider, size, rows, step, _arithmetic(provider, denoiser, asked))


def _arithmetic(provider: str, component: str, asked: Selection) -> str:
    precision = next((item.precision for item in asked.manifest.components if item.name == component), "fp32")
    return arithmetic_of(provider, precision, asked.exact)


def _place_in(component: str) -> int:
    """A request's way through its parts."""
    order = ("text_encoder", "vae_encoder", *_DENOISERS, "vae_decoder")
    return next((index for index, name in enumerate(order) if component.startswith(name)), len(order))


def _area(call: CapturedCall) -> int:
    """Of the one input that has height and width, in its own units."""
    return next((tensor.shape[2] * tensor.shape[3] for tensor in call.feed.values() if tensor.ndim == 4), 0)


def _place(case: TimedCase) -> tuple[str, tuple[int, int], int]:
    return case.provider, case.size, case.rows
