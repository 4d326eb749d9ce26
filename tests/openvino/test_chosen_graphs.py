"""Which of OpenVINO's graphs runs which calls, and the fallback for graphs that it cannot run, with a fake compiler.

Run by `scripts/test --openvino`: in all other tests OpenVINO is hidden (tests/hidden).
"""

import json
import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from img2img_server.bundle.manifest import Component, Manifest, Verification
from img2img_server.bundle.manifest import Source as BundleSource
from img2img_server.errors import BundleError
from img2img_server.runtime.common import cpu
from img2img_server.runtime.execution import Bucket, Execution
from img2img_server.runtime.onnx.modules import Graph
from img2img_server.runtime.onnx.runners import Runner, open_for
from img2img_server.runtime.onnx.sessions import SessionOptions
from img2img_server.runtime.providers.buckets import BucketRunner, LaterRunner
from img2img_server.runtime.providers.openvino import Graphs
from img2img_server.support.device_lock import measuring

Axes = dict[str, list[str | int]]

UNET: Axes = {
    "sample": ["sample.0", 4, "sample.2", "sample.3"],
    "timestep": ["timestep.0"],
    "encoder_hidden_states": ["encoder_hidden_states.0", "encoder_hidden_states.1", 8],
}
DECODER: Axes = {"latent_sample": ["latent_sample.0", 4, "latent_sample.2", "latent_sample.3"]}


class FakeGraph:
    """A compiled graph, or a session of the CPU provider, that counts its calls."""

    def __init__(self, inputs: Axes, fails: bool = False) -> None:
        self.calls = 0
        self._fails = fails
        self.inputs = [SimpleNamespace(name=key, shape=shape, type="tensor(float)") for key, shape in inputs.items()]
        self.outputs = [SimpleNamespace(name="out", shape=["out.0"], type="tensor(float)")]

    def run(self, feed: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        if self._fails:
            raise RuntimeError("no such kernel")
        self.calls += 1
        return [torch.stack([tensor.flatten(1)[:, 0] for tensor in feed.values() if tensor.dim() > 1]).sum(0)]


class FakeCompiler:
    """Compiles to fakes, and keeps the shapes that it was asked for."""

    threads = 3

    def __init__(self, inputs: Axes, fails: bool = False, refuses: bool = False, arithmetic: str = "f32") -> None:
        self.arithmetic = arithmetic
        self.asked: list[Mapping[str, Sequence[int]] | None] = []
        self.graphs: list[FakeGraph] = []
        self._inputs, self._fails, self._refuses = inputs, fails, refuses

    def ports(self, graph: Path) -> tuple[list[Any], list[Any]]:
        whole = FakeGraph(self._inputs)
        return whole.inputs, whole.outputs

    def __call__(self, graph: Path, shapes: Mapping[str, Sequence[int]] | None = None) -> Any:
        if self._refuses:
            raise BundleError(f"{graph} does not compile in OpenVINO: no such operator")
        self.asked.append(shapes)
        inputs: Axes = self._inputs if shapes is None else {name: list(shape) for name, shape in shapes.items()}
        self.graphs.append(FakeGraph(inputs, self._fails))
        return self.graphs[-1]

    def rows(self) -> list[int]:
        """The rows of each graph that was compiled, 0 for any shape."""
        return [0 if shapes is None else next(iter(shapes.values()))[0] for shapes in self.asked]


class CpuSessions:
    """Opens sessions of the CPU provider, as fakes that count their calls."""

    def __init__(self) -> None:
        self.opened: list[SessionOptions] = []
        self.calls = 0

    def __call__(self, graph: Path, options: SessionOptions) -> Any:
        self.opened.append(options)
        item = SimpleNamespace(name="out", shape=[], type="tensor(float)")
        return SimpleNamespace(get_inputs=list, get_outputs=lambda: [item], run=self._run)

    def _run(self, names: list[str], feed: Mapping[str, Any]) -> list[Any]:
        self.calls += 1
        return [np.zeros(1, np.float32)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The settings of a Stable Diffusion of 64 x 64 pixels."""
    configs = {
        "unet": {"sample_size": 8},
        "vae_decoder": {"block_out_channels": [1, 2, 3, 4]},
        "text_encoder": {"max_position_embeddings": 77},
    }
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path


def _manifest(name: str = "unet", precision: str = "fp32", size: int = 0) -> Manifest:
    return Manifest(
        source=BundleSource(),
        pipeline_class="",
        family="",
        backend="onnx",
        components=(Component(name, precision, bytes=size),),
        files={},
        tools={},
        verification=Verification(True),
    )


def _make(
    folder: Path,
    compiler: FakeCompiler,
    execution: Execution,
    manifest: Manifest | None = None,
    name: str = "unet",
    sessions: CpuSessions | None = None,
) -> Runner:
    made: Any = compiler
    graphs = Graphs(execution, folder, manifest or _manifest(name), sessions or CpuSessions(), made)
    return graphs(name, folder / name / "model.onnx")


def _feed(rows: int, height: int, width: int) -> dict[str, torch.Tensor]:
    return {
        "sample": torch.zeros(rows, 4, height, width),
        "timestep": torch.zeros(rows),
        "encoder_hidden_states": torch.zeros(rows, 77, 8),
    }


def _calls(compiler: FakeCompiler, runner: Runner, feed: dict[str, torch.Tensor]) -> tuple[list[int], torch.Tensor]:
    """The calls of each graph in a run, and its result."""
    before = [item.calls for item in compiler.graphs]
    (result,) = runner.run(feed)
    before += [0] * (len(compiler.graphs) - len(before))
    return [item.calls - earlier for item, earlier in zip(compiler.graphs, before, strict=True)], result


def test_configured_sizes_get_their_own_graphs_and_others_share_one(folder: Path) -> None:
    """Opened when first needed, but the smallest of each size."""
    compiler = FakeCompiler(UNET)
    buckets = (Bucket(64, 64, 4), Bucket(128, 64, 4), Bucket(64, 64, 2))
    runner = _make(folder, compiler, Execution(buckets=buckets))
    assert compiler.asked == [
        {"sample": (2, 4, 8, 8), "timestep": (2,), "encoder_hidden_states": (2, 77, 8)},
        {"sample": (4, 4, 8, 16), "timestep": (4,), "encoder_hidden_states": (4, 77, 8)},
    ]
    small, wide = compiler.graphs
    assert _calls(compiler, runner, _feed(2, 8, 8))[0] == [1, 0]
    assert _calls(compiler, runner, _feed(4, 8, 16))[0] == [0, 1]
    with measuring():
        runner.run(_feed(4, 8, 8))
    assert compiler.rows() == [2, 4, 4]
    for height, width in ((16, 8), (9, 8)):
        assert _calls(compiler, runner, _feed(2, height, width))[0][:3] == [0, 0, 0]
    assert compiler.rows() == [2, 4, 4, 0]
    assert small.calls
    assert wide.calls


@pytest.mark.parametrize(
    ("rows", "parts"),
    [(1, [1]), (2, [2]), (3, [2, 1]), (6, [2, 2, 2]), (8, [8]), (13, [8, 2, 2, 1]), (16, [8, 8])],
)
def test_rows_run_in_the_graphs_of_their_size(
    rows: int, parts: list[int], folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Never in the graph for any shape. Graphs that are not open yet are opened in the background; meanwhile rows run in the
    others, with the same results."""
    monkeypatch.setattr(cpu, "available_memory", lambda: 2**30)
    compiler = FakeCompiler(UNET)
    may_open = threading.Event()
    opens = FakeCompiler.__call__

    def late(self: FakeCompiler, graph: Path, shapes: Any = None) -> Any:
        if self.asked:
            assert may_open.wait(30)
        return opens(self, graph, shapes)

    monkeypatch.setattr(FakeCompiler, "__call__", late)
    runner = _make(folder, compiler, Execution())
    feed = _feed(rows, 8, 8)
    feed["sample"] += torch.arange(rows)[:, None, None, None]
    feed["encoder_hidden_states"] += 100 * torch.arange(rows)[:, None, None]
    made, result = _calls(compiler, runner, feed)
    assert made == [-(-rows // 2)]
    assert torch.equal(result, 101.0 * torch.arange(rows))
    may_open.set()
    with measuring():  # waits for the graphs
        runner.run(feed)
    made, result = _calls(compiler, runner, feed)
    assert {size: calls for size, calls in zip(compiler.rows(), made, strict=True) if calls} == Counter(parts)
    assert torch.equal(result, 101.0 * torch.arange(rows))
    assert set(compiler.rows()) == {2, *parts}


def test_a_graph_with_other_bits_does_not_serve(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "available_memory", lambda: 2**30)
    compiler = FakeCompiler(UNET)
    runner = _make(folder, compiler, Execution())
    run = FakeGraph.run

    def off(self: FakeGraph, feed: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        (result,) = run(self, feed)
        return [result if len(result) == 2 else torch.nextafter(result, torch.tensor(torch.inf))]

    monkeypatch.setattr(FakeGraph, "run", off)
    with measuring(), caplog.at_level(logging.INFO):
        (result,) = runner.run(_feed(9, 8, 8))
    assert compiler.rows() in ([2, 8, 1], [2, 1, 8])
    assert caplog.text.count("its results differ from those of the graph of 2 rows") == 2
    assert torch.equal(result, torch.zeros(9))
    made, _ = _calls(compiler, runner, _feed(9, 8, 8))
    assert made == [5, 0, 0]


def test_the_graph_for_any_shape_is_opened_before_a_request_of_another_size_is_admitted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "available_memory", lambda: 2**30)
    compiler = FakeCompiler(UNET)
    runner = _make(folder, compiler, Execution())
    open_for(runner, 64, 64)
    assert compiler.rows() == [2]
    open_for(runner, 64, 72)
    assert compiler.rows() == [2, 0]
    runner.run(_feed(2, 9, 8))
    assert compiler.rows() == [2, 0]


def test_graphs_that_are_opened_later_count_as_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as a compiled graph takes: in fp16 four times the weights' bytes. The first graph was measured with the model."""
    monkeypatch.setattr(cpu, "available_memory", lambda: 2**30)
    graph = Graph(_make(folder, FakeCompiler(UNET), Execution(), _manifest(precision="fp16", size=100)))
    counted = [graph.opened_bytes]
    for width, height, rows in ((8, 8, 2), (8, 8, 1), (8, 8, 1), (9, 8, 1), (8, 9, 2), (8, 8, 8)):
        with measuring():  # it waits for graphs of other numbers of rows
            graph(**_feed(rows, height, width))
        counted.append(graph.opened_bytes)
    assert counted == [0, 0, 400, 400, 800, 800, 1200]
    graph.close()
    assert graph.opened_bytes == 0


def test_other_sizes_run_on_the_cpu_provider_if_only_the_graph_for_any_shape_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "available_memory", lambda: 2**30)
    compiler, sessions = FakeCompiler(UNET), CpuSessions()
    runner = _make(folder, compiler, Execution(), sessions=sessions)
    compiler._refuses = True
    for _ in range(2):
        runner.run(_feed(2, 9, 8))
    assert (len(sessions.opened), sessions.calls) == (1, 2)
    assert "other sizes run on ONNX Runtime's CPU provider instead of OpenVINO" in caplog.text
    (result,) = runner.run(_feed(2, 8, 8))
    assert torch.equal(result, torch.zeros(2))


def test_graphs_whose_first_axis_is_fixed_are_not_divided(folder: Path) -> None:
    """Although that axis is as long as a call's rows."""
    graph, fixed = (FakeGraph(UNET | {"scale": [4]}) for _ in range(2))
    later = LaterRunner(graph.inputs, graph.outputs, lambda: graph)
    runner = BucketRunner(later, {}, {((2, 4, 8, 8), (2,), (2, 77, 8), (4,)): fixed}, {})
    for rows, calls in ((4, (1, 0)), (2, (1, 1))):
        runner.run(_feed(rows, 8, 8) | {"scale": torch.ones(4)})
        assert (graph.calls, fixed.calls) == calls


def test_each_configured_shape_of_a_graph_whose_first_axis_is_fixed_has_its_graph(folder: Path) -> None:
    """Opened at start: calls for other numbers of rows cannot be divided."""
    compiler = FakeCompiler(UNET | {"scale": [4]})
    runner = _make(folder, compiler, Execution(buckets=(Bucket(64, 64, 2), Bucket(64, 64, 8))))
    for rows, calls in ((2, [1, 0]), (8, [0, 1])):
        assert _calls(compiler, runner, _feed(rows, 8, 8) | {"scale": torch.ones(4)})[0] == calls
    assert compiler.rows() == [2, 8]


@pytest.mark.parametrize(
    ("name", "inputs", "buckets", "expected"),
    [
        ("unet", UNET, None, [[(2, 4, 8, 8), (2,), (2, 77, 8)]]),
        ("vae_decoder", DECODER, None, [None]),
        ("vae_decoder", DECODER, (Bucket(64, 128, 6),), [[(3, 4, 16, 8)]]),
        ("vae_encoder", {"sample": ["sample.0", 3, "sample.2", "sample.3"]}, (Bucket(64, 128, 1),), [[(1, 3, 128, 64)]]),
        (
            "unet",
            UNET | {"time_ids": ["time_ids.0", 6]},
            None,
            [[(2, 4, 8, 8), (2,), (2, 77, 8), (2, 6)]],
        ),
    ],
)
def test_by_default_the_denoiser_is_prepared_for_two_rows_of_the_native_size(
    name: str,
    inputs: Axes,
    buckets: tuple[Bucket, ...] | None,
    expected: list[list[tuple[int, ...]] | None],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "available_memory", lambda: 2**30)
    compiler = FakeCompiler(inputs)
    _make(folder, compiler, Execution(buckets=buckets), name=name)
    assert compiler.asked == [shapes and dict(zip(inputs, shapes, strict=True)) for shapes in expected]


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("unet", UNET | {"unheard_of": ["batch_size", "some_axis"]}),
        ("transformer", {"hidden_states": ["batch_size", "sequence"]}),
        ("text_encoder", {"input_ids": ["batch_size", "sequence_length"]}),
    ],
)
def test_graph_with_unknown_axes_is_compiled_once(name: str, inputs: Axes, folder: Path) -> None:
    compiler = FakeCompiler(inputs)
    assert not isinstance(_make(folder, compiler, Execution(), name=name), BucketRunner)
    assert compiler.asked == [None]
    none_wanted = FakeCompiler(UNET)
    _make(folder, none_wanted, Execution(buckets=()))
    assert none_wanted.asked == [None]


def test_static_graph_that_exceeds_memory_is_skipped_unless_configured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "available_memory", lambda: 7 * 2**30)
    manifest = _manifest(precision="fp16", size=2**30)
    for execution, rows in ((Execution(), [0]), (Execution(buckets=(Bucket(64, 64, 2),)), [2])):
        compiler = FakeCompiler(UNET)
        _make(folder, compiler, execution, manifest)
        assert compiler.rows() == rows
    monkeypatch.setattr(cpu, "available_memory", lambda: 63 * 2**30)
    compiler = FakeCompiler(UNET)
    runner = _make(folder, compiler, Execution(), manifest)
    with measuring():
        runner.run(_feed(11, 8, 8))
    assert compiler.rows() == [2, 1], "one row, but not eight: that graph takes more than a sixteenth"
    assert "4.0 of the available 7.0 GiB; --buckets 64x64:2 forces it" in caplog.text


@pytest.mark.parametrize(
    ("compiler", "precision", "reason"),
    [
        (FakeCompiler(UNET, refuses=True), "fp32", "no such operator"),
        (FakeCompiler(UNET, fails=True), "fp32", "no such kernel"),
        (FakeCompiler(UNET), "int8", "int8 graphs"),
        (FakeCompiler(UNET), "bf16", "bf16 graphs"),
    ],
    ids=["does not compile", "does not run", "int8", "bf16"],
)
def test_unsupported_graphs_fall_back_to_the_cpu_provider_and_log_why(
    compiler: FakeCompiler, precision: str, reason: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sessions = CpuSessions()
    runner = _make(folder, compiler, Execution(), _manifest(precision=precision), sessions=sessions)
    runner.run({})
    assert ([options.provider for options in sessions.opened], sessions.calls) == (["cpu"], 1)
    assert "unet: runs on ONNX Runtime's CPU provider instead of OpenVINO: " in caplog.text
    assert reason in caplog.text
