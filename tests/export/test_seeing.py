"""A text encoder that sees images (Qwen2.5-VL) as two graphs: transformers' whole module is the oracle."""

import copy
import itertools
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from img2img_export.component import described
from img2img_export.convert.emulation import value_types
from img2img_export.convert.external_weights import GRAPH_NAME
from img2img_export.convert.tracing import trace
from img2img_export.progress import Progress
from img2img_export.verify.parity import compare, open_graph
from img2img_export.verify.recorded_inputs import Calls
from img2img_server.bundle.manifest import limits_of
from img2img_server.runtime.onnx.modules import Graph
from img2img_server.runtime.onnx.runners import HostRunner
from img2img_server.runtime.onnx.vision import TOWER, OnnxSeeingTextEncoder, places
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import get_vision_position_ids, get_vision_window_index

IMAGE, VIDEO, VOCABULARY = 90, 91, 100


def call(text: int, *grids: tuple[int, int]) -> dict[str, Any]:
    """A call with a text of so many tokens around images of so many patches."""
    generator = torch.Generator().manual_seed(text)
    tokens = [torch.randint(3, IMAGE, (text,), generator=generator)]
    for height, width in grids:
        tokens += [torch.full((height * width // 4,), IMAGE), torch.randint(3, IMAGE, (2,), generator=generator)]
    ids = torch.cat(tokens)[None]
    patches = torch.randn(sum(height * width for height, width in grids), 1176, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, *grid] for grid in grids]),
        "output_hidden_states": True,
    }


class Made:
    """A module with a layer of windows and one without in its tower, its graphs, and the comparisons."""

    def __init__(self, folder: Path) -> None:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            text = {
                "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048,
                "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3], "rope_type": "default"},
            }  # fmt: skip
            vision = {
                "depth": 3, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
                "fullatt_block_indexes": [1],
            }  # fmt: skip
            config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO)
            self.module = Qwen2_5_VLForConditionalGeneration(config).eval()
            for value in self.module.parameters():
                value.add_(0.1 * torch.randn_like(value))
        self.folder, self.states = folder, {2}
        recorded = call(7, (6, 14))
        self.calls = Calls(recorded, states=self.states)
        self.calls.add({name: value for name, value in recorded.items() if isinstance(value, torch.Tensor)})
        self.parts, self.graphs, self.sessions = {}, {}, {}
        for name in ("text_encoder", TOWER):
            part, example, cases = described(name, self.module, self.calls)
            graph = trace(self.module, part, example)
            graph.write(folder / name, Progress(), name)
            self.parts[name], self.graphs[name] = (part, example, cases), graph
            self.sessions[name] = open_graph(folder / name / GRAPH_NAME)
        self.module.config.save_pretrained(folder / "text_encoder")
        text_graph, tower = (Graph(HostRunner(self.sessions[name])) for name in ("text_encoder", TOWER))
        self.encoder = OnnxSeeingTextEncoder(text_graph, tower, folder / "text_encoder")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("seeing"))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "grids",
    [[(2, 2)], [(8, 8)], [(4, 6)], [(10, 26)], [(34, 12)], [(16, 18), (6, 4)], [(4, 4), (20, 10), (8, 30)]],
    ids=str,
)
def test_images_of_any_size_and_number_match_transformers(made: Made, grids: list[tuple[int, int]]) -> None:
    """The last hidden state, and with it the features of each image."""
    asked = call(11, *grids)
    with torch.no_grad():
        expected = made.module(**asked).hidden_states[-1]
    found = made.encoder(**asked).hidden_states
    assert found[0] is None
    assert error(found[-1], expected) < 1e-5


def test_a_text_without_images_is_read_as_by_transformers(made: Made) -> None:
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = made.module(ids, output_hidden_states=True).hidden_states[-1]
    assert error(made.encoder(ids, torch.ones_like(ids)).hidden_states[-1], expected) < 1e-5


@pytest.mark.parametrize("grid", [(2, 2), (8, 8), (10, 26), (34, 12)], ids=str)
def test_places_and_windows_match_transformers(made: Made, grid: tuple[int, int]) -> None:
    config = made.module.config.vision_config
    found = places(config.to_dict(), *grid)
    sizes = torch.tensor([[1, *grid]])
    positions = get_vision_position_ids(sizes, config.spatial_merge_size)
    cos, sin = made.module.model.visual.rotary_pos_emb(torch.zeros(1), positions)
    half = cos.shape[-1] // 2
    assert torch.allclose(found["rotary"], torch.stack([cos[:, :half], sin[:, :half]], 1), atol=1e-6)
    cells, ends = get_vision_window_index(
        sizes, spatial_merge_size=config.spatial_merge_size, window_size=config.window_size, patch_size=config.patch_size
    )
    patches = (cells[:, None] * 4 + torch.arange(4)).flatten()
    ends = ends.unique()
    theirs = {frozenset(patches[a:b].tolist()) for a, b in itertools.pairwise(ends)}
    ours = {frozenset(row[mask].tolist()) for row, mask in zip(found["windows"], found["window_mask"], strict=True)}
    assert ours == theirs
    assert torch.equal(found["windows"].flatten()[found["slots"]], torch.arange(len(found["slots"])))
    assert found["window_mask"].flatten()[found["slots"]].all()


@pytest.mark.parametrize("name", ["text_encoder", TOWER])
def test_comparisons_of_an_export_pass_and_have_other_sizes_than_the_trace(made: Made, name: str) -> None:
    part, example, cases = made.parts[name]
    key = next(iter(part.inputs))
    traced = example[key].shape
    assert sum(case.inputs[key].shape != traced for case in cases) >= 3
    for parity in compare(part, made.sessions[name], cases, limits_of("fp32", "")):
        assert parity.passed
        assert parity.relative_error < 1e-5


def test_each_graph_has_its_weights_only(made: Made) -> None:
    assert not [name for name in made.graphs["text_encoder"].weights if ".visual." in name or "lm_head" in name]
    assert all(".visual." in name for name in made.graphs[TOWER].weights if name.startswith("module."))


@pytest.mark.parametrize("name", ["text_encoder", TOWER])
def test_half_precision_has_half_precision_products(made: Made, name: str) -> None:
    part, example, _ = made.parts[name]
    half = trace(copy.deepcopy(made.module), part, example, torch.float16)
    types = value_types(half)
    products = [node for node in half.model.graph.node if node.op_type in ("MatMul", "Gemm")]
    assert len(products) > 12
    wide = [node for node in products if types[node.output[0]] != onnx.TensorProto.FLOAT16]
    assert not [node.name for node in wide if "rotary" not in node.name]


def test_images_and_their_places_have_an_effect(made: Made) -> None:
    asked = call(5, (6, 10))
    before = made.encoder(**asked).hidden_states[-1]
    for changed in ({"pixel_values": -asked["pixel_values"]}, {"image_grid_thw": torch.tensor([[1, 10, 6]])}):
        assert (made.encoder(**asked | changed).hidden_states[-1] - before).abs().max() > 1e-4
