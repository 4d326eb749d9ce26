"""`img2img bench-model`: operations are counted as torch counts them, variants take turns, and errors are plain."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from img2img_cli.__main__ import main
from img2img_export.build import export_model
from img2img_export.options import ExportOptions
from img2img_server.tools.bench_model import command
from img2img_server.tools.bench_model.measuring import PEAK, STEP, TimedCase, take_turns
from img2img_server.tools.bench_model.operations import Operations, count_operations, node_operations, quadratic
from img2img_server.tools.bench_model.report import quartiles, summarize
from PIL import Image
from short_exports import cut_short
from torch.utils.flop_counter import FlopCounterMode


@pytest.mark.parametrize(
    ("kind", "inputs", "outputs", "operations"),
    [
        ("MatMul", [[2, 5, 3], [3, 7]], [[2, 5, 7]], 2 * 2 * 5 * 3 * 7),
        ("MatMul", [[2, 5, 3]], [[2, 5, 7]], 2 * 2 * 5 * 3 * 7),
        ("Gemm", [[5, 3], [7, 3], [7]], [[5, 7]], 2 * 5 * 3 * 7),
        ("DynamicQuantizeMatMul", [[1, 5, 3], [3, 7], [1], []], [[1, 5, 7]], 2 * 5 * 3 * 7),
        ("Conv", [[1, 4, 8, 8], [6, 4, 3, 3], [6]], [[1, 6, 8, 8]], 2 * 6 * 64 * 36),
        ("Conv", [[1, 4, 8, 8], [4, 1, 3, 3]], [[1, 4, 8, 8]], 2 * 4 * 64 * 9),
        ("QLinearConv", [[1, 4, 8, 8], [], [], [6, 4, 1, 1]], [[1, 6, 8, 8]], 2 * 6 * 64 * 4),
        ("NhwcConv", [[1, 8, 8, 4], [6, 3, 3, 4]], [[1, 8, 8, 6]], 2 * 6 * 64 * 36),
        ("ConvTranspose", [[1, 4, 8, 8], [4, 6, 2, 2]], [[1, 6, 16, 16]], 2 * 4 * 64 * 24),
        ("MultiHeadAttention", [[2, 5, 8], [2, 3, 8], [2, 3, 8]], [[2, 5, 8]], 2 * (2 * 2 * 5 * 3 * 8)),
        ("Softmax", [[2, 5, 8]], [[2, 5, 8]], 0),
    ],
)
def test_a_node_takes_what_is_computed_by_hand(
    kind: str, inputs: list[list[int]], outputs: list[list[int]], operations: int
) -> None:
    assert node_operations(kind, inputs, outputs) == operations


def _flops(call: Callable[[], object]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def test_graphs_take_what_torch_counts(bundle: Callable[[str], Path], tiny_model: Callable[[str], Path]) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_model("sd1") / "unet")
    # torch does not count its own fused attention on a CPU.
    unet.set_attn_processor(AttnProcessor())
    text, timestep = torch.randn(3, 77, 32), torch.full((3,), 5.0)
    seen = {"sample": torch.randn(3, 4, 8, 8), "timestep": timestep, "encoder_hidden_states": text}
    counted = Operations.count(bundle("sd1") / "unet" / "model.onnx", seen)
    sample = torch.randn(1, 4, 40, 24)
    assert counted.at(40 * 24) == _flops(lambda: unet(sample, timestep[:1], text[:1]))
    vae = AutoencoderKL.from_pretrained(tiny_model("sd1") / "vae")
    vae.set_attn_processor(AttnProcessor())
    picture = torch.randn(1, 3, 64, 128)
    encoder = Operations.count(bundle("sd1") / "vae_encoder" / "model.onnx", {"sample": picture}, pictures=True)
    assert encoder.at(64 * 128) == _flops(lambda: vae.encode(picture))


def test_operations_grow_with_rows(bundle: Callable[[str], Path]) -> None:
    graph = bundle("sd1") / "text_encoder" / "model.onnx"
    one, three = count_operations(graph, [{"input_ids": torch.ones(rows, 77, dtype=torch.long)} for rows in (1, 3)])
    assert three == 3 * one > 0


def test_three_squares_tell_of_every_area() -> None:
    def truth(area: int) -> int:
        return 7 + 5 * area + 3 * area**2

    sides = (8, 16, 24)
    assert quadratic(sides, [truth(side * side) for side in sides])(64 * 96) == truth(64 * 96)


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
    cases = [TimedCase("unet", "cuda", (64, 64), 1, quick, "fp32", 10), TimedCase("unet", "cpu", (64, 64), 1, slow, "fp32", 10)]
    return cases, order, clock


def test_variants_take_turns_and_only_the_call_is_timed() -> None:
    cases, order, clock = _fakes()
    rounds = take_turns(cases, lambda: None, lambda: clock[0])
    for _ in range(3):
        next(rounds)
    assert order == ["quick", "slow", "slow", "quick", "quick", "slow"]
    assert [case.seconds for case in cases] == [[1.0] * 3, [4.0] * 3]


def test_what_was_measured_before_a_person_cut_it_short_is_told() -> None:
    cases, _, _ = _fakes(stop_at=2)
    assert command._measure(cases, 1000.0, ("cpu",))
    report = summarize(cases, "models/x")
    assert [len(line.seconds) for line in report.lines] == [1, 2]
    assert all(case.work.closed for case in cases)  # type: ignore[attr-defined]


def test_a_ratio_is_of_the_same_round_and_a_share_of_the_same_arithmetic() -> None:
    cases, _, clock = _fakes()
    peak = TimedCase(PEAK, "cpu", (8, 8), 1, _Fake("peak", clock, [], 1.0), "fp32", 20)
    rounds = take_turns([*cases, peak], lambda: None, lambda: clock[0])
    next(rounds)
    quick, slow = summarize([*cases, peak], "models/x").lines
    assert (quick.ratio, slow.ratio) == (4.0, 1.0)
    assert slow.share == pytest.approx(10 / 4 / 20)


@pytest.mark.parametrize(
    ("values", "expected"), [([5.0], (5, 5, 5)), ([4.0, 1.0, 3.0, 2.0, 5.0], (2, 3, 4)), ([1.0, 2.0], (1.25, 1.5, 1.75))]
)
def test_quartiles_lie_between_neighbours(values: list[float], expected: tuple[float, ...]) -> None:
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
    assert all(line["lower"] <= line["median"] <= line["upper"] and line["share"] > 0 for line in lines)
    assert json.loads(told.read_text())["peaks"][0]["arithmetic"] == "fp32"
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*sized, "64 x 128", "share", "peak of cpu in fp32"))
    with Image.open(plot) as picture:
        assert picture.width > 500


@pytest.mark.nightly
def test_a_bundle_of_torch_is_measured_by_the_step(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    with cut_short():
        export_model(ExportOptions(str(tiny_model("sd1")), tmp_path / "bundle", backend="torch"))
    assert _bench(tmp_path / "bundle", "--rows", 2, "--seconds", 0, "--json", tmp_path / "told.json") == 0
    (line,) = _lines(tmp_path / "told.json")
    assert (line["component"], line["provider"], line["rows"], line["share"]) == (STEP, "cpu", 2, None)


def test_a_model_that_runs_whole_is_measured_too(bundle: Callable[[str], Path], tmp_path: Path) -> None:
    asked = ("--providers", "cpu", "--rows", "1,2", "--seconds", 0, "--json", tmp_path / "told.json", "--no-operations")
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
def test_what_cannot_be_measured_is_one_line(
    bundle: Callable[[str], Path], flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    providers = () if "--providers" in flags else ("--providers", "cpu")
    assert _bench(bundle("sd1"), *providers, *flags) == 1
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith("img2img bench-model: ")
    assert message in last


def test_a_folder_that_is_no_bundle_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _bench(tmp_path) == 1
    assert capsys.readouterr().err == f"img2img bench-model: {tmp_path} is not a bundle: it has no manifest.json\n"


@pytest.mark.parametrize("flags", [("--sizes", "64:2"), ("--rows", "0"), ("--providers", "abacus"), ("--buckets", "64")])
def test_words_that_mean_nothing_are_errors(flags: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as exit_:
        _bench("models/x", *flags)
    assert exit_.value.code == 2
