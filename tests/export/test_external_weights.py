"""Graphs without their weights: tracing, constant folding, and that writing holds one weight at a time."""

import weakref
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from img2img_export.convert.external_weights import DATA_NAME, ExternalWeightsGraph, Weight, without_weights
from img2img_export.progress import Progress
from onnx import TensorProto, helper


def graph(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    return helper.make_model(
        helper.make_graph(nodes, "g", [value], [output]), ir_version=8, opset_imports=[helper.make_opsetid("", 18)]
    )


def run(folder: Path, x: np.ndarray) -> np.ndarray:
    result: np.ndarray = onnxruntime.InferenceSession(folder / "model.onnx").run(None, {"x": x})[0]
    return result


def test_weight_reshapes_are_folded_when_written(tmp_path: Path) -> None:
    matrix, bias = torch.randn(600, 4), torch.randn(600)
    axes = helper.make_node("Constant", [], ["axes"], value=helper.make_tensor("axes", TensorProto.INT64, [1], [0]))
    model = graph(
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["m"]),
        axes,
        helper.make_node("Unsqueeze", ["b", "axes"], ["row"]),
        helper.make_node("Add", ["m", "row"], ["y"]),
    )
    external = ExternalWeightsGraph(model, {"w": Weight.of(matrix, torch.float32), "b": Weight.of(bias, torch.float32)})
    external.fold()
    assert [node.op_type for node in external.model.graph.node] == ["MatMul", "Add"]
    assert sorted(weight.shape for weight in external.weights.values()) == [(1, 600), (4, 600)]
    external.write(tmp_path, Progress(), "w")
    x = torch.randn(3, 4)
    np.testing.assert_allclose(run(tmp_path, x.numpy()), (x @ matrix.T + bias).numpy(), rtol=1e-5, atol=1e-5)
    assert (tmp_path / DATA_NAME).stat().st_size >= external.bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weightless_module_has_tiny_distinct_parameters(dtype: torch.dtype) -> None:
    module = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(1500)))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with without_weights(module, dtype) as true:
        numbers = list(module.parameters())
        assert {value.dtype for value in numbers} == {dtype}
        assert sum(value.untyped_storage().nbytes() for value in numbers) == len(numbers) * dtype.itemsize
        assert len({value.flatten()[0].item() for value in numbers}) == len(numbers), "the exporter merges equal ones"
        assert all(number.shape == before[name].shape for name, number in true.items())
        assert torch.isfinite(module[:3](torch.ones(1, 64, dtype=dtype))).all()
    after = module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_shared_parameters_stay_shared() -> None:
    module = torch.nn.ModuleList([torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)])
    module[1].weight = module[0].weight
    with without_weights(module, torch.float32):
        assert module[0].weight is module[1].weight
    assert module[0].weight is module[1].weight


def test_weights_are_loaded_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Weight.read
    alive: list[int] = []

    def counted(weight: Weight) -> torch.Tensor:
        value = read(weight).clone()
        alive.append(1)
        weakref.finalize(value, alive.pop)
        assert len(alive) == 1, "the one before must be gone"
        return value

    monkeypatch.setattr(Weight, "read", counted)
    nodes = [helper.make_node("Add", ["x" if index == 0 else f"s{index}", f"w{index}"], [f"s{index + 1}"]) for index in range(5)]
    nodes[-1].output[0] = "y"
    weights = {f"w{index}": Weight.of(torch.ones(500, 4), torch.float16) for index in range(5)}
    ExternalWeightsGraph(graph(*nodes), weights).write(tmp_path, Progress(), "w")
    assert not alive
