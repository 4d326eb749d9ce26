"""Runners of device tensors, on real sessions of the CPU: their bindings, recordings and replays."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from img2img_server.runtime.onnx.runners import HostRunner, Runner
from img2img_server.runtime.onnx.sessions import SessionOptions, open_session
from img2img_server.runtime.providers.cuda_graphs import ROW_BUCKETS, SHRINK, Replays
from img2img_server.runtime.providers.device_runner import DeviceRunner
from img2img_server.support.device_lock import DEVICE_IN_USE, recording_at_once
from onnx import TensorProto, helper

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sample [b, c] and timestep [b] to their sum [b, c], in half precision too, and to which of its values are positive."""
    nodes = [
        helper.make_node("Unsqueeze", ["timestep", "axis"], ["column"]),
        helper.make_node("Add", ["sample", "column"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Greater", ["sum", "zero"], ["positive"]),
    ]
    made = helper.make_graph(
        nodes,
        "sums",
        [
            helper.make_tensor_value_info("sample", TensorProto.FLOAT, ["b", "c"]),
            helper.make_tensor_value_info("timestep", TensorProto.FLOAT, ["b"]),
        ],
        [
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, ["b", "c"]),
            helper.make_tensor_value_info("half", TensorProto.FLOAT16, ["b", "c"]),
            helper.make_tensor_value_info("positive", TensorProto.BOOL, ["b", "c"]),
        ],
        [helper.make_tensor("axis", TensorProto.INT64, [1], [1]), helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0])],
    )
    path = tmp_path_factory.mktemp("graphs") / "model.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    return path


class Recording:
    """A session like one with CUDA graphs: the first call with an id records its addresses, later calls use these instead of
    their own bindings. Recordings belong to the thread, as ONNX Runtime's do."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.recorded: dict[tuple[int, str], Any] = {}
        self.calls: list[str] = []
        self.shrunk: list[str] = []
        self.refuses = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        graph_id = options.get_run_config_entry("gpu_graph_id")
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        if graph_id != "-1":
            if self.refuses:
                raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")
            binding = self.recorded.setdefault((threading.get_ident(), graph_id), binding)
        self.calls.append(graph_id)
        if _shrinks(options):
            self.shrunk.append(graph_id)
            return  # the CPU's arena has another name
        self._session.run_with_iobinding(binding, options)


def _shrinks(options: Any) -> bool:
    try:
        return bool(options.get_run_config_entry(SHRINK[0]) == SHRINK[1])
    except RuntimeError:  # it has no such entry
        return False


def feed(rows: int, columns: int = 3, start: float = 0.0) -> dict[str, torch.Tensor]:
    sample = torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns) - 2 + start
    return {"sample": sample, "timestep": torch.arange(rows, dtype=torch.float32)}


def is_right(given: dict[str, torch.Tensor], outputs: list[torch.Tensor]) -> bool:
    total = given["sample"] + given["timestep"][:, None]
    expected = [total, total.half(), total > 0]
    return all(
        one.dtype == other.dtype and torch.equal(one, other) and one.is_contiguous()
        for one, other in zip(outputs, expected, strict=True)
    )


Make = Callable[[Path], Runner]


def recording(path: Path, **settings: int) -> tuple[DeviceRunner, Recording]:
    session: Any = Recording(open_session(path, SessionOptions()))
    return DeviceRunner(session, "cpu", replays=Replays(session, "cpu", "unet", **settings)), session


MAKERS: dict[str, Make] = {
    "host": lambda path: HostRunner(open_session(path, SessionOptions())),
    "device": lambda path: DeviceRunner(open_session(path, SessionOptions()), "cpu"),
    "replays": lambda path: recording(path, patience=1)[0],
}


@pytest.mark.parametrize("kind", MAKERS)
def test_runner_outputs_do_not_depend_on_earlier_calls(graph: Path, kind: str) -> None:
    runner = MAKERS[kind](graph)
    for start in range(5):
        for rows in (2, 1, 4):
            given = feed(rows, start=start)
            assert is_right(given, runner.run(given))


@pytest.mark.parametrize("kind", MAKERS)
def test_runner_outputs_are_not_overwritten_by_later_calls(graph: Path, kind: str) -> None:
    runner = MAKERS[kind](graph)
    kept = [(given, runner.run(given)) for given in (feed(2, start=start) for start in range(6))]
    assert all(is_right(given, outputs) for given, outputs in kept)


@pytest.mark.parametrize("kind", MAKERS)
def test_runner_does_not_modify_its_inputs(graph: Path, kind: str) -> None:
    runner, given = MAKERS[kind](graph), feed(2)
    for _ in range(4):
        runner.run(given)
    assert torch.equal(given["sample"], feed(2)["sample"])


def test_onnx_runtime_allocates_outputs_only_on_a_shapes_first_call(graph: Path) -> None:
    """Its memory then belongs to torch, which frees and reuses it in the order of the stream."""
    allocated: list[int] = []

    class Watched(Recording):
        def io_binding(self) -> Any:
            binding = self._session.io_binding()
            bind = binding.bind_output

            def bind_output(*place: Any) -> None:
                allocated.append(len(place))
                bind(*place)

            binding.bind_output = bind_output
            return binding

    session: Any = Watched(open_session(graph, SessionOptions()))
    runner = DeviceRunner(session, "cpu")
    for rows in (2, 2, 3, 2, 3):
        runner.run(feed(rows))
    by_call = [allocated[index : index + 3] for index in range(0, len(allocated), 3)]
    assert [set(places) for places in by_call] == [{3}, {6}, {3}, {6}, {6}]


def test_stream_is_entered_before_each_device_call(graph: Path) -> None:
    session: Any = Recording(open_session(graph, SessionOptions()))
    order: list[int] = []
    runner = DeviceRunner(session, "cpu", enter=lambda: order.append(len(session.calls)))
    for _ in range(3):
        runner.run(feed(2))
    assert order == [0, 1, 2]


def test_frequent_shape_is_recorded_and_replayed(graph: Path) -> None:
    runner, session = recording(graph, patience=3)
    for start in range(8):
        given = feed(2, start=start)
        assert is_right(given, runner.run(given))
    assert session.calls == ["-1"] * 3 + ["1"] * 5
    runner.run(feed(5))
    assert session.calls[-1] == "-1", "a rare shape costs nothing"


def test_nothing_is_recorded_while_another_thread_uses_the_device(graph: Path) -> None:
    runner, session = recording(graph, patience=1)
    with DEVICE_IN_USE:
        for _ in range(5):
            assert is_right(feed(2), runner.run(feed(2)))
    assert session.calls == ["-1"] * 5
    runner.run(feed(2))
    assert session.calls[-1] == "1"
    assert not DEVICE_IN_USE.locked()


def test_recordings_are_per_shape_and_evicted_lru(graph: Path) -> None:
    runner, session = recording(graph, patience=1, most=2)
    for rows in (1, 2, 1, 4):
        for start in range(3):
            given = feed(rows, start=start)
            assert is_right(given, runner.run(given))
    assert session.calls == ["-1", "1", "1", "-1", "2", "2", "1", "1", "1", "-1", "3", "3"]
    for start in range(3):
        given = feed(2, start=start)
        assert is_right(given, runner.run(given))
    assert session.calls[-3:] == ["-1", "4", "4"], "under a new id, once it was seen again"


def test_rows_are_padded_to_a_recorded_row_count(graph: Path) -> None:
    """Calls of any number of rows are replays: the policy mixes requests, so numbers of rows change all the time."""
    runner, session = recording(graph)
    with recording_at_once():
        for rows in ROW_BUCKETS:
            runner.run(feed(rows))
    before = len(session.calls)
    for rows in (3, 16, 1, 5, 7, 13, 2, 9):
        given = feed(rows, start=rows)
        assert is_right(given, runner.run(given))
    assert session.calls[before:] == ["3", "5", "1", "4", "4", "5", "2", "5"]


def test_calls_above_the_largest_recording_are_replayed_in_parts(graph: Path) -> None:
    runner, session = recording(graph, patience=0)
    for rows in (16, 2, 35):
        given = feed(rows, start=rows)
        assert is_right(given, runner.run(given))
    assert session.calls[-4:] == ["1", "1", "-1", "3"], "16, 16 and the 3 that are left, padded to 4, learnt and recorded"


def test_inputs_without_a_row_axis_are_not_padded_or_split(tmp_path: Path) -> None:
    """Flux's positions: [tokens], where samples are [rows, tokens]."""
    made = helper.make_graph(
        [helper.make_node("Add", ["sample", "positions"], ["sum"])],
        "positions",
        [
            helper.make_tensor_value_info("sample", TensorProto.FLOAT, ["b", "n"]),
            helper.make_tensor_value_info("positions", TensorProto.FLOAT, ["n"]),
        ],
        [helper.make_tensor_value_info("sum", TensorProto.FLOAT, ["b", "n"])],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    runner, session = recording(path, patience=0)
    assert runner.row_buckets == ROW_BUCKETS
    for rows, tokens in ((3, 5), (4, 5), (2, 4), (35, 3), (3, 5)):
        given = {"sample": torch.rand(rows, tokens), "positions": torch.rand(tokens)}
        assert torch.equal(runner.run(given)[0], given["sample"] + given["positions"])
    assert session.calls[-1] == session.calls[2] == "1", "3 and 4 rows are one recording"


def test_total_number_of_recordings_is_bounded(graph: Path) -> None:
    """Released recordings are not freed, so ever-changing shapes are run without recording."""
    runner, session = recording(graph, patience=0, most=2, most_ever=5)
    for columns in range(1, 12):
        for _ in range(3):
            assert is_right(feed(1, columns), runner.run(feed(1, columns)))
    assert {int(graph_id) for graph_id in session.calls} == {-1, 1, 2, 3, 4, 5}
    runner.run(feed(1, 5))
    assert session.calls[-1] == "5", "what is recorded stays"


def test_shrinking_memory_keeps_results_correct_and_uses_no_recording(graph: Path) -> None:
    runner, session = recording(graph, patience=0)
    kept = runner.run(feed(2))
    runner.run(feed(2))
    assert session.calls[-1] == "1"
    runner.give_back()
    assert session.shrunk == ["-1"], "by a call that is not one of the recorded ones"
    assert is_right(feed(2), kept)
    assert is_right(feed(2), runner.run(feed(2)))
    assert session.calls[-1] == "2", "recorded anew"


def test_unrecordable_shape_runs_without_recording_and_warns_once(graph: Path, caplog: pytest.LogCaptureFixture) -> None:
    runner, session = recording(graph, patience=1)
    for _ in range(3):
        runner.run(feed(1))
    session.refuses = True
    with caplog.at_level(logging.WARNING):
        for rows in (2, 2, 2, 2, 3, 3, 3):
            assert is_right(feed(rows), runner.run(feed(rows)))
    assert len(caplog.records) == 1, "once"
    assert "unet" in caplog.text
    assert "900" in caplog.text
    session.refuses = False
    runner.run(feed(1))
    assert session.calls[-1] == "1", "what was recorded before is good"


def test_a_replay_that_fails_is_an_error(graph: Path) -> None:
    runner, session = recording(graph, patience=0)
    runner.run(feed(1))
    runner.run(feed(1))
    session.refuses = True
    with pytest.raises(RuntimeError, match="900"):
        runner.run(feed(1))


def test_each_thread_makes_its_own_recordings(graph: Path) -> None:
    """Models are measured by another thread than the one that serves them."""
    runner, session = recording(graph, patience=1)
    for _ in range(4):
        runner.run(feed(2))
    assert session.calls[-1] == "1"
    right: list[bool] = []

    def serve() -> None:
        right.extend(is_right(feed(2, start=start), runner.run(feed(2, start=start))) for start in range(4))

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()
    assert right == [True] * 4
    assert session.calls[4:] == ["-1", "2", "2", "2"]


def test_noncontiguous_input_is_refused(graph: Path) -> None:
    given = feed(3)
    given["sample"] = given["sample"].T.contiguous().T
    with pytest.raises(AssertionError, match="contiguous"):
        DeviceRunner(open_session(graph, SessionOptions()), "cpu").run(given)
