"""Graphs of tokens: every input has an effect, padding has none, and half precision is half everywhere."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from covering import nightly_but
from img2img_export.convert.emulation import value_types
from img2img_export.convert.external_weights import GRAPH_NAME, ExternalWeightsGraph
from img2img_export.convert.token_graphs import Layout, TokenKind, token_part
from img2img_export.convert.tracing import trace
from img2img_export.progress import Progress
from img2img_export.verify import token_cases
from img2img_export.verify.parity import open_graph
from img2img_server.runtime.onnx import token_graphs

MODELS = ["sd3", "flux-dev", "chroma", "kontext", "klein", "flux2", "longcat-edit", "qwenimage", "qwenimage-clean", "zimage"]
"""Tiny models; "qwenimage-clean" has `zero_cond_t`, as Qwen-Image-Edit-2511 has it."""

_EVERY_RUN = ("sd3", "flux-dev", "chroma", "longcat-edit", "klein", "qwenimage-clean", "zimage")


class Made:
    """A transformer, and its graph in fp32 and fp16."""

    def __init__(self, name: str, directory: Path, output: Path) -> None:
        self.module = transformer(name, directory)
        self.part, self.kind = token_part("transformer", self.module)
        example = token_cases.example(self.part, self.kind)
        self.half = trace(copy.deepcopy(self.module), self.part, example, torch.float16)
        trace(self.module, self.part, example).write(output, Progress(), "transformer")
        self.session = open_graph(output / GRAPH_NAME)

    def run(self, inputs: dict[str, torch.Tensor]) -> np.ndarray:
        known = {item.name: inputs[item.name].numpy() for item in self.session.get_inputs()}
        found: np.ndarray = self.session.run(None, known)[0]
        return found

    def inputs(self, *layouts: Layout) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        """The rows' calls of diffusers' class, and the graph's inputs for them together."""
        generator = torch.Generator().manual_seed(len(layouts))
        calls = [self.kind.example(layout, 0.9 / (number + 1), generator) for number, layout in enumerate(layouts)]
        return calls, token_graphs.join([self.kind.graph.inputs(call) for call in calls])


def transformer(name: str, directory: Path) -> Any:
    import diffusers

    kind = getattr(diffusers, json.loads((directory / "transformer" / "config.json").read_text())["_class_name"])
    module = kind.from_pretrained(directory, subfolder="transformer").eval()
    if not name.endswith("-clean"):
        return module
    torch.manual_seed(0)
    return kind.from_config({**module.config, "zero_cond_t": True}).eval()


@pytest.fixture(scope="module")
def made(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    known: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in known:
            directory = tiny_model(name.removesuffix("-clean"))
            known[name] = Made(name, directory, tmp_path_factory.mktemp("graph") / "transformer")
        return known[name]

    return get


@pytest.mark.parametrize("name", nightly_but(MODELS, *_EVERY_RUN))
def test_each_row_of_a_batch_matches_diffusers(name: str, made: Callable[[str], Made]) -> None:
    """Rows with prompts of different lengths if texts have a mask, and with references of different numbers and sizes."""
    one = made(name)
    texts = (5, 45, 33) if "text_mask" in one.kind.inputs else (9, 9, 9)
    sizes = [((4, 6),) * 2, ((8, 3), (2, 6), (3, 4)), ((2, 12), (6, 4))]
    calls, inputs = one.inputs(*(Layout(text, some) for text, some in zip(texts, sizes, strict=True)))
    for call, row in zip(calls, one.run(inputs), strict=True):
        with torch.no_grad():
            expected = one.kind.reference(one.module, call).numpy()
        assert np.abs(row[: len(expected)] - expected).max() < 1e-4 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("name", nightly_but(MODELS, *_EVERY_RUN))
def test_every_input_but_the_padding_affects_the_output(name: str, made: Callable[[str], Made]) -> None:
    one = made(name)
    _, inputs = one.inputs(Layout(9, ((4, 6), (3, 3))), Layout(40 if "text_mask" in one.kind.inputs else 9, ((3, 8), (9, 1))))
    before = one.run(inputs)
    for key, value in inputs.items():
        if value.dtype == torch.bool:
            changed = value ^ (torch.arange(value.shape[1]) % 3 == 0)
        elif value.dtype == torch.int64:
            changed = 1 - value
        else:
            changed = value * 0.8 if value.ndim == 1 else value.flip(-1) * 0.9
        assert np.abs(one.run({**inputs, key: changed}) - before).max() > 1e-4, key
    if "text_mask" in inputs:
        noise = inputs["encoder_hidden_states"] + 50 * ~inputs["text_mask"][..., None]
        assert np.abs(one.run({**inputs, "encoder_hidden_states": noise}) - before).max() < 1e-5


@pytest.mark.parametrize("name", nightly_but(MODELS, *_EVERY_RUN))
def test_half_precision_graph_has_only_half_precision_products(name: str, made: Callable[[str], Made]) -> None:
    """A mask of booleans would be exported in fp32, with all that follows; so would the rotated queries and keys."""
    half: ExternalWeightsGraph = made(name).half
    types = value_types(half)
    products = [node for node in half.model.graph.node if node.op_type in ("MatMul", "Gemm")]
    wide = [node.name for node in products if types[node.output[0]] != onnx.TensorProto.FLOAT16]
    assert len(products) > 10
    assert not wide
    exact = {item.name for item in half.model.graph.input if item.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    assert exact == set(TokenKind.EXACT) & {item.name for item in half.model.graph.input}
