"""`img2img bench-model`: every round times every variant once, and errors are one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from img2img_cli.__main__ import main
from img2img_export.build import export_model
from img2img_export.options import ExportOptions
from img2img_server.tools.bench_measuring import STEP, TimedCase, run_rounds
from img2img_server.tools.bench_model import _measure, quartiles, summarize
from PIL import Image
from short_exports import cut_short


class _Fake:
    """Work on a clock of its own: `ready` takes long and must not be timed."""

    def __init__(self, name: str, clock: list[float], order: list[str], seconds: float, stop_at: int = 0) -> None:
        self._name, self._clock, self._order, self._seconds, self._stop_at = name, clock, order, seconds, stop_at
        self.closed = False

    def ready(self) -> None:
        self._clock[0] += 100

    def run(self) -> None:
        self._order.append(self._name)
        if self._stop_at and self._order.count(self._name) == self._stop_at:
            raise KeyboardInterrupt
        self._clock[0] += self._seconds

    def close(self) -> None:
        self.closed = True


def _fakes(stop_at: int = 0) -> tuple[list[TimedCase], list[str], list[float]]:
    clock, order = [0.0], list[str]()
    slow = _Fake("slow", clock, order, 4.0)
    quick = _Fake("quick", clock, order, 1.0, stop_at)
    cases = [TimedCase("unet", "cuda", (64, 64), 1, quick), TimedCase("unet", "cpu", (64, 64), 1, slow)]
    return cases, order, clock


def test_rounds_alternate_their_order_and_only_the_call_is_timed() -> None:
    cases, order, clock = _fakes()
    rounds = run_rounds(cases, lambda: None, lambda: clock[0])
    for _ in range(3):
        next(rounds)
    assert order == ["quick", "slow", "slow", "quick", "quick", "slow"]
    assert [case.seconds for case in cases] == [[1.0] * 3, [4.0] * 3]


def test_results_before_an_interruption_are_reported() -> None:
    cases, _, _ = _fakes(stop_at=2)
    assert _measure(cases, 1000.0, ("cpu",))
    report = summarize(cases, "models/x")
    assert [len(line.seconds) for line in report.lines] == [1, 2]
    assert all(case.work.closed for case in cases)  # type: ignore[attr-defined]


def test_the_ratio_compares_times_of_the_same_round() -> None:
    cases, _, clock = _fakes()
    next(run_rounds(cases, lambda: None, lambda: clock[0]))
    quick, slow = summarize(cases, "models/x").lines
    assert (quick.ratio, slow.ratio) == (4.0, 1.0)


@pytest.mark.parametrize(
    ("values", "expected"), [([5.0], (5, 5, 5)), ([4.0, 1.0, 3.0, 2.0, 5.0], (2, 3, 4)), ([1.0, 2.0], (1.25, 1.5, 1.75))]
)
def test_quartiles_are_interpolated(values: list[float], expected: tuple[float, ...]) -> None:
    assert quartiles(values) == pytest.approx(expected)


def _bench(*words: object) -> int:
    return main(["bench-model", *map(str, words)])


def _lines(path: Path) -> list[dict[str, Any]]:
    told: dict[str, Any] = json.loads(path.read_text())
    return list(told["lines"])


def test_every_part_and_the_step_are_measured(
    bundle: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot, told = tmp_path / "bench.png", tmp_path / "bench.json"
    asked = ("--providers", "cpu", "--sizes", "64,64x128", "--rows", "1,3", "--seconds", 0)
    assert _bench(bundle("sd1"), *asked, "--json", told, "--plot", plot) == 0
    lines = _lines(told)
    places = {(line["component"], line["width"], line["height"], line["rows"]) for line in lines}
    sized = ("vae_encoder", "unet", "vae_decoder", STEP)
    wanted = {(name, 64, height, rows) for name in sized for height in (64, 128) for rows in (1, 3)}
    assert places == wanted | {("text_encoder", 0, 0, rows) for rows in (1, 3)}
    assert {len(line["seconds"]) for line in lines} == {3}
    assert all(line["lower"] <= line["median"] <= line["upper"] for line in lines)
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*sized, "64 x 128", "ms per row", "ratio"))
    with Image.open(plot) as image:
        assert image.width > 500


@pytest.mark.nightly
def test_pytorch_bundle_is_measured_per_step(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    with cut_short():
        export_model(ExportOptions(str(tiny_model("sd1")), tmp_path / "bundle", backend="torch"))
    assert _bench(tmp_path / "bundle", "--rows", 2, "--seconds", 0, "--json", tmp_path / "told.json") == 0
    (line,) = _lines(tmp_path / "told.json")
    assert (line["component"], line["provider"], line["rows"]) == (STEP, "cpu", 2)


def test_opaque_pipeline_is_measured(bundle: Callable[[str], Path], tmp_path: Path) -> None:
    asked = ("--providers", "cpu", "--rows", "1,2", "--seconds", 0, "--json", tmp_path / "told.json")
    assert _bench(bundle("pix2pix"), *asked) == 0
    assert {line["component"] for line in _lines(tmp_path / "told.json")} >= {"unet", "vae_decoder", STEP}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--sizes", "100"), "100 x 100: this model's sizes are multiples of 8"),
        (("--plot", "x.pdf"), "--plot writes .png and .svg, not 'x.pdf'"),
        (("--providers", "cuda"), "provider 'cuda'"),
    ],
)
def test_unmeasurable_model_is_a_one_line_error(
    bundle: Callable[[str], Path], flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    providers = () if "--providers" in flags else ("--providers", "cpu")
    assert _bench(bundle("sd1"), *providers, *flags) == 1
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith("img2img bench-model: ")
    assert message in last


def test_folders_other_than_bundles_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _bench(tmp_path) == 1
    assert capsys.readouterr().err == f"img2img bench-model: {tmp_path} is not a bundle: it has no manifest.json\n"


@pytest.mark.parametrize("flags", [("--sizes", "64:2"), ("--rows", "0"), ("--providers", "abacus"), ("--buckets", "64")])
def test_invalid_arguments_are_errors(flags: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as exit_:
        _bench("models/x", *flags)
    assert exit_.value.code == 2
