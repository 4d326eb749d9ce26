"""The nodes for ComfyUI and NodeTool, against a server. Neither program is needed: the test defines the few names that the nodes
import."""

import asyncio
import importlib.util
import io
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
from fake_image_service import image_bytes
from fakes import FakePipeline
from img2img_client import InvalidRequest
from img2img_server.config import DEFAULT_GUIDANCE, DEFAULT_PROMPT, DEFAULT_STEPS, DEFAULT_STRENGTH, ImageAdapterFolder
from img2img_server.models.registry import ModelRegistry
from PIL import Image
from prompting import image_encoder, model, write_adapters
from running import running, store

CLIENTS = Path(__file__).parents[2] / "clients"
DEFAULTS = {
    "prompt": DEFAULT_PROMPT, "negative_prompt": "", "strength": DEFAULT_STRENGTH, "guidance_scale": DEFAULT_GUIDANCE, "seed": -1
}  # fmt: skip

NO_PROMPT = {"image_adapter": "", "image_prompt_scale": 1.0}


@pytest.fixture
def pipeline() -> FakePipeline:
    return FakePipeline()


@pytest.fixture
def target(pipeline: FakePipeline) -> Iterator[str]:
    with running(lambda: store(m=pipeline)) as server:
        yield f"127.0.0.1:{server.port}"


@pytest.fixture
def prompted(pipeline: FakePipeline, tmp_path: Path) -> Iterator[str]:
    """A server whose model takes image prompts."""

    def models() -> ModelRegistry:
        return ModelRegistry([model("m", pipeline), image_encoder()], default="m")

    with running(models, image_adapters=ImageAdapterFolder(write_adapters(tmp_path))) as server:
        yield f"127.0.0.1:{server.port}"


def load(file: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(file).stem + "_example", CLIENTS / file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def comfy() -> Any:
    return load("comfyui/nodes.py").NODE_CLASS_MAPPINGS["Img2ImgServerTransform"]


def comfy_fields(node: Any, **values: object) -> dict[str, Any]:
    fields = {**node.INPUT_TYPES()["required"], **node.INPUT_TYPES()["optional"]}
    return {**{name: field[1]["default"] for name, field in fields.items() if len(field) > 1}, **values}


def test_comfyui_fields_have_the_servers_defaults(comfy: Any) -> None:
    fields = comfy_fields(comfy)
    assert fields == {**DEFAULTS, "steps": DEFAULT_STEPS, "target": "localhost:50051", "model": "", "scheduler": "", **NO_PROMPT}


def test_comfyui_batch_is_transformed_in_order(comfy: Any, target: str, pipeline: FakePipeline) -> None:
    batch = torch.stack([torch.full((16, 24, 3), level) for level in (0.0, 0.5, 1.0)])
    (images,) = comfy().transform(**comfy_fields(comfy, image=batch, target=target, seed=5, steps=4, strength=0.5))
    assert images.shape == batch.shape
    assert images.dtype == torch.float32
    asked = sorted((state.request for state in pipeline.prepared), key=lambda request: request.seeds)
    assert [request.seeds for request in asked] == [(5,), (6,), (7,)]
    assert [request.image.getpixel((0, 0)) for request in asked] == [(0, 0, 0), (128, 128, 128), (255, 255, 255)]
    for index in range(3):
        (alone,) = comfy().transform(
            **comfy_fields(comfy, image=batch[index : index + 1], target=target, seed=5 + index, steps=4, strength=0.5)
        )
        assert torch.equal(alone[0], images[index])


def test_nodes_omit_unsupported_fields(comfy: Any, target: str, pipeline: FakePipeline) -> None:
    pipeline.fields = {}
    fields = comfy_fields(comfy, image=torch.zeros(1, 16, 24, 3), target=target, steps=5, negative_prompt="fog", model="m")
    comfy().transform(**fields)
    state = pipeline.prepared[-1]
    assert (state.step_count, state.request.negative_prompt, state.request.guidance_scale) == (5, None, 1.0)


def test_comfyui_image_prompts_are_sent(comfy: Any, prompted: str, pipeline: FakePipeline) -> None:
    images = torch.stack([torch.full((16, 24, 3), level) for level in (0.0, 1.0)])
    fields = comfy_fields(comfy, image=torch.zeros(1, 16, 24, 3), target=prompted)
    comfy().transform(**{**fields, "image_prompt": images, "image_adapter": "style", "image_prompt_scale": 0.5})
    (use,) = pipeline.prepared[-1].request.image_prompts
    assert (use.adapter, use.scale) == ("style", 0.5)
    assert [image.getpixel((0, 0)) for image in use.images] == [(0, 0, 0), (255, 255, 255)]
    for wrong, words in (
        ({"image_prompt": images}, "no image adapter is named"),
        ({"image_adapter": "style"}, "there is no image"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            comfy().transform(**{**fields, **wrong})


def test_comfyui_progress_and_cancel(comfy: Any, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    cancelled: list[Exception] = []

    class ProgressBar:
        def __init__(self, total: int) -> None:
            self.total = total

        def update(self, steps: int) -> None:
            done.append(self.total)

    def check() -> None:
        if cancelled:
            raise cancelled[0]

    management, utils = types.ModuleType("comfy.model_management"), types.ModuleType("comfy.utils")
    management.throw_exception_if_processing_interrupted = check  # type: ignore[attr-defined]
    utils.ProgressBar = ProgressBar  # type: ignore[attr-defined]
    for module in (types.ModuleType("comfy"), management, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    fields = comfy_fields(comfy, image=torch.zeros(2, 16, 16, 3), target=target, steps=4, strength=0.5)
    comfy().transform(**fields)
    assert done == [4, 4, 4, 4]
    cancelled.append(InterruptedError("cancelled"))
    with pytest.raises(InterruptedError):
        comfy().transform(**fields)


def test_comfyui_errors_name_the_field(comfy: Any, target: str) -> None:
    with pytest.raises(InvalidRequest, match="scheduler"):
        comfy().transform(**comfy_fields(comfy, image=torch.zeros(1, 16, 16, 3), target=target, scheduler="none such"))


def test_comfyui_runs_seed_minus_one_again(comfy: Any) -> None:
    assert comfy.IS_CHANGED(seed=-1) != comfy.IS_CHANGED(seed=-1)
    assert comfy.IS_CHANGED(seed=3) == comfy.IS_CHANGED(seed=3)


class Context:
    """The part of NodeTool's ProcessingContext that the node uses."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    async def asset_to_bytes(self, image: Any) -> bytes:
        return image_bytes("green", (24, 16))

    async def image_from_bytes(self, data: bytes) -> bytes:
        return data

    def post_message(self, message: Any) -> None:
        self.messages.append(message)


@pytest.fixture
def nodetool(monkeypatch: pytest.MonkeyPatch) -> Any:
    class BaseNode(pydantic.BaseModel):
        id: str = "n1"

    class ImageRef(pydantic.BaseModel):
        uri: str = ""

    names: dict[str, dict[str, Any]] = {
        "nodetool.metadata.types": {"ImageRef": ImageRef},
        "nodetool.workflows.base_node": {"BaseNode": BaseNode},
        "nodetool.workflows.processing_context": {"ProcessingContext": Context},
        "nodetool.workflows.types": {"NodeProgress": types.SimpleNamespace},
    }
    for name, content in names.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return load("nodetool/img2img_node.py").Img2ImgServerTransform


def test_nodetool_fields_have_the_servers_defaults(nodetool: Any) -> None:
    node = nodetool()
    assert {name: getattr(node, name) for name in DEFAULTS} == DEFAULTS
    assert node.num_inference_steps == DEFAULT_STEPS
    assert set(node.get_basic_fields()) <= set(nodetool.model_fields)


def test_nodetool_image_is_transformed(nodetool: Any, target: str, pipeline: FakePipeline) -> None:
    context = Context()
    data = asyncio.run(nodetool(target=target, seed=3, num_inference_steps=4, strength=0.5).process(context))
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (24, 16)
    assert [(message.node_id, message.progress, message.total) for message in context.messages] == [("n1", 1, 2), ("n1", 2, 2)]
    assert pipeline.prepared[0].request.seeds == (3,)


def test_nodetool_image_prompts_are_sent(nodetool: Any, prompted: str, pipeline: FakePipeline) -> None:
    node = nodetool(target=prompted, image_adapter="style", image_prompt_scale=0.5)
    asyncio.run(node.process(Context()))
    (use,) = pipeline.prepared[0].request.image_prompts
    assert (use.adapter, use.scale, [image.getpixel((0, 0)) for image in use.images]) == ("style", 0.5, [(0, 128, 0)])
