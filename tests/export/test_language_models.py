"""Text encoders that are language models, as graphs: they have the outputs that the pipeline reads, for texts of any length."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from covering import nightly_but
from diffusers import DiffusionPipeline
from img2img_export.component import described
from img2img_export.convert.emulation import value_types
from img2img_export.convert.external_weights import GRAPH_NAME, constants
from img2img_export.convert.making import make
from img2img_export.convert.parts import Part, Tensors
from img2img_export.convert.tracing import trace
from img2img_export.convert.weight_only import OPERATOR
from img2img_export.errors import ExportError
from img2img_export.progress import Progress
from img2img_export.verify.parity import Case, compare, open_graph, problems_of
from img2img_export.verify.recorded_inputs import Calls, Recorder
from img2img_server.bundle.manifest import limits_of
from img2img_server.runtime.onnx.modules import Graph, OnnxTextEncoder
from img2img_server.runtime.onnx.runners import HostRunner

READ = {"klein": (9, 18, 27), "flux2": (10, 20, 30), "zimage": (1,), "qwenimage": (2,)}
"""The hidden states that diffusers' pipelines read, by tiny model."""
with_few_layers = pytest.mark.parametrize("made", nightly_but(READ, "zimage", "qwenimage"), indirect=True, scope="module")
"""Runs a test for the others at night only: they have 30 layers, which take ten times as long to trace."""


def embeds(pipe: Any) -> torch.Tensor:
    """The pipeline's embedding of a prompt: [B, T, D]; for Z-Image, whose texts have different lengths, [T, D]."""
    found: Any = pipe.encode_prompt("a red fox in the snow")[0]
    return torch.as_tensor(found[0] if isinstance(found, list) else found)


class Made:
    """A text encoder as its pipeline calls it, its graph, and the comparisons."""

    def __init__(self, name: str, directory: Path, folder: Path) -> None:
        pipe = DiffusionPipeline.from_pretrained(directory)
        with Recorder(pipe, ("text_encoder",)) as recorder, torch.no_grad():
            self.embeds = embeds(pipe)
        self.calls: Calls = recorder.calls["text_encoder"]
        self.pipe, self.module, self.folder = pipe, pipe.text_encoder, folder
        self.part: Part
        self.example: Tensors
        self.cases: list[Case]
        self.part, self.example, self.cases = described("text_encoder", self.module, self.calls)
        self.graph = trace(self.module, self.part, self.example)
        self.graph.write(folder, Progress(), "text_encoder")
        self.module.config.save_pretrained(folder)
        self.session = open_graph(folder / GRAPH_NAME)

    def run(self, inputs: Tensors) -> Any:
        """The graph's outputs. Z-Image's pipeline gives masks of booleans."""
        return self.session.run(None, {name: value.to(self.example[name].dtype).numpy() for name, value in inputs.items()})

    def errors(self, inputs: Tensors) -> list[float]:
        """The largest differences of the graph's outputs from transformers', relative to the largest value."""
        with torch.no_grad():
            states = self.module(**inputs, output_hidden_states=True).hidden_states
        found = self.run(inputs)
        expected = [states[int(name.rpartition(".")[2])].numpy() for name in self.part.outputs]
        return [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, expected, strict=True)]


@pytest.fixture(scope="module", params=nightly_but(READ, "klein", "zimage", "qwenimage"))
def made(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(request.param, tiny_model(request.param), tmp_path_factory.mktemp("graph") / request.param)


@pytest.fixture
def read(made: Made) -> tuple[int, ...]:
    return next(states for states in READ.values() if {f"hidden_states.{index}" for index in states} == set(made.part.outputs))


def test_graph_has_the_states_that_the_pipeline_reads_and_no_layers_after_them(made: Made, read: tuple[int, ...]) -> None:
    assert made.calls.states == set(read)
    layers = {int(name.partition(".layers.")[2].split(".")[0]) for name in made.graph.weights if ".layers." in name}
    assert layers == set(range(max(read)))
    assert not [name for name in made.graph.weights if "lm_head" in name]
    is_last = max(read) == made.module.config.get_text_config().num_hidden_layers
    assert any(name.endswith(".norm.weight") for name in made.graph.weights) == is_last, "the norm after the last layer"


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("tokens", [2, 31, 64, 500])
def test_texts_of_any_length_match_transformers_and_their_padding_does(made: Made, rows: int, tokens: int) -> None:
    """The rows are padded after the text, before it, and not at all."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(3, made.module.config.get_text_config().vocab_size, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, tokens - tokens // 3 :] = 0
    mask[-1, : tokens // 3] = 0 if rows > 1 else 1
    assert max(made.errors({"input_ids": ids, "attention_mask": mask})) < 1e-5


def test_the_mask_and_every_earlier_token_have_an_effect(made: Made) -> None:
    ids = torch.randint(3, 60, (1, 21), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)

    def last(ids: torch.Tensor, mask: torch.Tensor) -> Any:
        return made.run({"input_ids": ids, "attention_mask": mask})[-1][0]

    before = last(ids, mask)
    for token in range(20):
        changed, hidden = ids.clone(), mask.clone()
        changed[0, token] = 61
        hidden[0, token] = 0
        assert np.abs(last(changed, mask)[:token] - before[:token]).max(initial=0) == 0
        assert np.abs(last(changed, mask)[token:] - before[token:]).max() > 1e-4
        assert np.abs(last(ids, hidden)[-1] - before[-1]).max() > 1e-6


def test_comparisons_of_an_export_have_padding_and_other_lengths_than_the_trace(made: Made) -> None:
    traced = made.example["input_ids"].shape[1]
    lengths = {case.inputs["input_ids"].shape[1] for case in made.cases}
    assert len(lengths) == 3
    assert traced not in lengths
    random = [case.inputs["attention_mask"] for case in made.cases if case.is_random]
    assert all(mask[0, -1] == 0 for mask in random)
    assert any(mask[-1, 0] == 0 for mask in random)
    for case in made.cases:
        assert max(made.errors(case.inputs)) < 1e-5, case.name


@with_few_layers
def test_half_precision_has_exact_rotary_frequencies_and_half_precision_products(made: Made) -> None:
    half = trace(copy.deepcopy(made.module), made.part, made.example, torch.float16)
    types = value_types(half)
    products = [node for node in half.model.graph.node if node.op_type in ("MatMul", "Gemm")]
    assert len(products) > 4 * max(int(name.rpartition(".")[2]) for name in made.part.outputs)
    assert not [node.name for node in products if types[node.output[0]] != onnx.TensorProto.FLOAT16]
    rotary = next(part for name, part in made.module.named_modules() if name.endswith("rotary_emb") and "vision" not in name)
    frequencies = rotary.inv_freq.numpy()
    same = [value for value in constants(half.model).values() if value.size == frequencies.size and value.dtype == np.float32]
    assert any((value.reshape(-1) == frequencies).all() for value in same)


@with_few_layers
@pytest.mark.parametrize("numbers", nightly_but(["fp16:int4", "fp16:", "bf16:", "int8:", "fp32:int8"], "fp16:int4"))
def test_each_precision_passes_the_comparisons_of_an_export(numbers: str, made: Made, tmp_path: Path) -> None:
    """Every matrix of the layers is in the precision."""
    precision: Any
    narrow: Any
    precision, narrow = numbers.split(":")
    graph = make(copy.deepcopy(made.module), made.part, made.example, precision, narrow, 32)
    products = 7 * max(made.calls.states)
    assert sum(node.op_type == OPERATOR for node in graph.model.graph.node) == (products if narrow else 0)
    assert sum(weight.dtype == torch.int8 for weight in graph.weights.values()) == (products if precision == "int8" else 0)
    graph.write(tmp_path, Progress(), "text_encoder")
    found = compare(made.part, open_graph(tmp_path / GRAPH_NAME), made.cases, limits_of(precision, narrow))
    assert not list(problems_of(found))
    assert max(part.relative_error for part in found) > 1e-7, "other numbers than in fp32"


def test_pipeline_with_the_graph_encodes_the_same_text(made: Made, read: tuple[int, ...]) -> None:
    encoder = OnnxTextEncoder(Graph(HostRunner(made.session)), made.folder)
    answer = encoder(**made.calls.all()[0], output_hidden_states=True, use_cache=False).hidden_states
    count = made.module.config.get_text_config().num_hidden_layers + 1
    assert len(answer) == count
    assert [index for index, state in enumerate(answer) if state is not None] == list(read)
    assert answer[read[0] - count] is answer[read[0]]
    made.pipe.text_encoder = encoder
    try:
        found = embeds(made.pipe)
    finally:
        made.pipe.text_encoder = made.module
    assert (found - made.embeds).abs().max() < 1e-5 * made.embeds.abs().max()


def test_language_model_with_unread_states_is_not_exported(made: Made) -> None:
    calls = copy.copy(made.calls)
    calls.states = set()
    with pytest.raises(ExportError, match="the pipeline reads none"):
        described("text_encoder", made.module, calls)
