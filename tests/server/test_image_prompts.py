"""Requests with image prompts, in one batch with others: images as diffusers draws them with IP-Adapters, to 1/255."""

import dataclasses
import io
import itertools
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    ControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
)
from drawing import Counted, alone, companions, load, together
from fakes import Caller, make_request
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1 import model_pb2
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img.v1.model_pb2_grpc import ModelServiceStub
from img2img_export.verify.images import sample_image
from img2img_server.backends.local import local
from img2img_server.bundle.adapter_files import LoraFiles
from img2img_server.bundle.control_kinds import control_kind
from img2img_server.bundle.image_adapters import ImageAdapterFiles
from img2img_server.bundle.image_encoders import PIXELS
from img2img_server.bundle.image_prompts import layer_widths, states_width
from img2img_server.bundle.manifest import read_manifest
from img2img_server.config import ImageAdapterFolder
from img2img_server.engine.cache import Cache
from img2img_server.engine.engine import Engine
from img2img_server.engine.request import Completed, ControlUse, Failed, LoraUse, Mask, Request, run_alone
from img2img_server.errors import InvalidField, ModelNotLoaded
from img2img_server.runtime.companions import Companions
from img2img_server.runtime.diffusion.stepped import SteppedPipeline
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.image_encoders import ImageEncoder
from img2img_server.runtime.image_prompts import prompts as image_prompts
from img2img_server.runtime.image_prompts.prompts import ImageAdapterSettings
from img2img_server.runtime.loader import load_pipeline
from img2img_server.runtime.lora.adapters import LoraSettings
from img2img_server.support.model_fields import IMAGE_PROMPTS
from lora_making import make, write_diffusers
from PIL import Image
from running import running_backend
from safetensors.torch import load_file, save_file
from tiny_image_adapters import ENCODER, image_of, prompt, write_all
from tiny_image_encoders import SIDE
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

Get = Callable[[str], Path]
Mix = tuple[tuple[str, str, float], ...]
"""The image prompts of a request: the adapter, letters of its images, and its scale."""

SETTINGS: dict[str, Any] = {"prompt": "a lake", "strength": 0.8, "num_inference_steps": 4, "guidance_scale": 5.0}
MIXES: tuple[Mix, ...] = (
    (),
    (("plain", "a", 1.0),),
    (("plus", "abc", 0.5),),
    (("plain", "b", 0.0),),
    (("plain", "ab", 1.0), ("plus", "c", -1.0)),
    (("full", "c", 1.0),),
    (("plain", "a", 1.0), ("plain", "b", 0.7)),
)
PAIR: tuple[Mix, ...] = ((), MIXES[4])
MASK = Image.new("L", (64, 64), 0)
MASK.paste(255, (20, 8, 60, 48))


@dataclasses.dataclass
class Model:
    """A tiny model with image adapters: the server's pipeline, and the folder of the adapters."""

    name: str
    pipeline: SteppedPipeline
    adapters: ImageAdapterFiles

    def requests(self, mixes: Sequence[Mix] = MIXES, **changes: Any) -> list[Request]:
        settings = {"negative_prompt": None, "image": sample_image(64, 64), **SETTINGS, **changes}
        return [
            make_request(seeds=(5 + index,), image_prompts=tuple(prompt(self.adapters, *one) for one in mix), **settings)
            for index, mix in enumerate(mixes)
        ]


@pytest.fixture(scope="module")
def encoders(image_encoder_bundle: Get, control_bundle: Get, tmp_path_factory: pytest.TempPathFactory) -> Companions:
    """The image encoder of all adapters, another one, and a ControlNet."""
    known = {ENCODER: image_encoder_bundle(ENCODER), "g": image_encoder_bundle("g"), "a": control_bundle("sd1-a")}
    return companions(tmp_path_factory.mktemp("companions"), known)


@pytest.fixture(scope="module")
def adapters(tiny_model: Get, tiny_image_encoder: Get, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of adapters of each kind for a tiny model by its name."""
    folder = tmp_path_factory.mktemp("adapters")

    def get(name: str) -> Path:
        if not (folder / name).is_dir():
            write_all(folder / name, tiny_model(name), tiny_image_encoder(ENCODER))
        return folder / name

    return get


@pytest.fixture
def model(bundle: Get, adapters: Get, encoders: Companions) -> Callable[..., Model]:
    """A tiny model by its bundle's name, with the adapters of a folder or its own ones."""

    def get(path: str, folder: Path | None = None, **more: Any) -> Model:
        name = path.partition(":")[0]
        files = ImageAdapterFiles(folder or adapters(name))
        settings = ImageAdapterSettings(files, Cache(2**24))
        return Model(name, load(bundle(path), encoders, image_adapters=settings, **more), files)

    return get


@pytest.fixture(scope="module")
def oracle(tiny_model: Get, tiny_image_encoder: Get) -> Callable[..., np.ndarray]:
    """diffusers' own image."""

    reader = {
        "image_encoder": CLIPVisionModelWithProjection.from_pretrained(tiny_image_encoder(ENCODER)),
        "feature_extractor": CLIPImageProcessor(size=SIDE, crop_size=SIDE),
    }

    def draw(
        model: Model,
        mix: Mix,
        seed: int,
        kind: Any = AutoPipelineForImage2Image,
        lora: Path | None = None,
        parts: Mapping[str, Any] = MappingProxyType({}),
        **changes: Any,
    ) -> np.ndarray:
        pipe = kind.from_pretrained(tiny_model(model.name), **reader, **parts, safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        if lora is not None:
            pipe.load_lora_weights(lora.parent, weight_name=lora.name)
        given = {}
        if mix:
            assert model.adapters.folder is not None
            names = [f"{name}.safetensors" for name, *_ in mix]
            pipe.load_ip_adapter(str(model.adapters.folder), subfolder="", weight_name=names)
            pipe.set_ip_adapter_scale([scale for *_, scale in mix])
            given["ip_adapter_image"] = [[image_of(letter) for letter in letters] for _, letters, _ in mix]
        settings = {"image": sample_image(64, 64), **SETTINGS, **given, **changes}
        return np.asarray(pipe(generator=torch.Generator().manual_seed(seed), **settings).images[0], int)

    return draw


def png_of(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def matches(image: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(image - expected).max() <= 1)


@pytest.mark.parametrize(("name", "count"), [("sd1", len(MIXES)), ("sdxl", 4)])
def test_mixed_batch_matches_diffusers(
    name: str, count: int, model: Callable[..., Model], oracle: Callable[..., np.ndarray]
) -> None:
    """Each request gets the bits that it gets alone."""
    known = model(name)
    batch = known.requests(MIXES[:count])
    drawn = together(known.pipeline, batch)
    for index, (request, image) in enumerate(zip(batch, drawn, strict=True)):
        mix = MIXES[index]
        assert matches(image, oracle(known, mix, 5 + index)), mix
        assert np.array_equal(image, alone(known.pipeline, request)), mix
        without = alone(known.pipeline, dataclasses.replace(request, image_prompts=()))
        has_effect = any(use.scale for use in request.image_prompts)
        assert np.array_equal(image, without) == (not has_effect), mix
        assert not has_effect or np.abs(image - without).mean() > 3, "a prompt that changes nothing would prove nothing"


def test_a_latent_consistency_model_matches_diffusers(
    bundle: Get, model: Callable[..., Model], oracle: Callable[..., np.ndarray]
) -> None:
    """It has one row for an image. Its control graph is for image prompts only: no ControlNet fits."""
    known = model("lcm:fp32:further")
    assert control_kind(bundle("lcm:fp32:further"), read_manifest(bundle("lcm:fp32:further"))) == ()
    for index, image in enumerate(together(known.pipeline, known.requests(PAIR))):
        assert matches(image, oracle(known, PAIR[index], 5 + index)), PAIR[index]


@pytest.mark.nightly
def test_an_inpainting_model_matches_diffusers(model: Callable[..., Model], oracle: Callable[..., np.ndarray]) -> None:
    known = model("sd-inpaint:fp32:further")
    for index, image in enumerate(together(known.pipeline, known.requests(PAIR, mask=Mask(MASK, paste=False)))):
        expected = oracle(known, PAIR[index], 5 + index, AutoPipelineForInpainting, mask_image=MASK, width=64, height=64)
        assert matches(image, expected), PAIR[index]


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_scale": 1.0},
        {"strength": 0.5, "num_inference_steps": 6, "negative_prompt": "blurry"},
    ],
)
def test_other_settings_match_diffusers(
    changes: dict[str, Any], model: Callable[..., Model], oracle: Callable[..., np.ndarray]
) -> None:
    known = model("sd1")
    for index, image in enumerate(together(known.pipeline, known.requests(PAIR, **changes))):
        assert matches(image, oracle(known, PAIR[index], 5 + index, **changes)), PAIR[index]


def test_masked_requests_match_diffusers(model: Callable[..., Model], oracle: Callable[..., np.ndarray]) -> None:
    known = model("sd1")
    for index, image in enumerate(together(known.pipeline, known.requests(PAIR, mask=Mask(MASK, paste=False)))):
        expected = oracle(known, PAIR[index], 5 + index, AutoPipelineForInpainting, mask_image=MASK, width=64, height=64)
        assert matches(image, expected), PAIR[index]


def test_all_images_of_a_request_have_its_image_prompts(model: Callable[..., Model]) -> None:
    """Each is the image of its seed alone."""
    known = model("sd1")
    (request,) = known.requests(MIXES[2:3])
    images = run_alone(known.pipeline, dataclasses.replace(request, seeds=(7, 8)))
    for seed, image in zip((7, 8), images, strict=True):
        assert np.array_equal(np.asarray(image, int), alone(known.pipeline, dataclasses.replace(request, seeds=(seed,))))


def test_requests_with_loras_controls_image_prompts_and_none_share_calls(
    model: Callable[..., Model], oracle: Callable[..., np.ndarray], tiny_model: Get, tiny_controlnet: Get, tmp_path: Path
) -> None:
    """Each has the same bits in any batch. The image with all three is diffusers'."""
    folder = tmp_path / "loras"
    folder.mkdir()
    pairs = make(tiny_model("sd1"), 1, ("to_q", "to_v", "ff.net.2"), (8,))
    write_diffusers({module: (0.3 * down, 0.3 * up) for module, (down, up) in pairs.items()}, folder / "style.safetensors")
    files = LoraFiles(folder)
    known = model("sd1", loras=LoraSettings(files, Cache(2**28), 8))
    plain, prompted = (dataclasses.replace(request, seeds=(5,)) for request in known.requests(PAIR))
    lora = {"loras": (LoraUse("style", 1.0, files.find("style").digest),)}
    control = {"controls": (ControlUse("a", sample_image(64, 64)),)}
    batch = [dataclasses.replace(one, **more) for one in (plain, prompted) for more in ({}, lora, control, {**lora, **control})]
    drawn = together(known.pipeline, batch)
    for request, image in zip(batch, drawn, strict=True):
        assert np.array_equal(image, alone(known.pipeline, request))
    expected = oracle(
        known,
        PAIR[1],
        5,
        StableDiffusionControlNetImg2ImgPipeline,
        lora=folder / "style.safetensors",
        parts={"controlnet": ControlNetModel.from_pretrained(tiny_controlnet("sd1-a"))},
        control_image=sample_image(64, 64),
        controlnet_conditioning_scale=1.0,
    )
    assert matches(drawn[-1], expected)
    for index, other in itertools.combinations(drawn, 2):
        assert np.abs(index - other).mean() > 1


@pytest.fixture
def encoded(encoders: Companions, monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Counts the images that the image encoder reads."""
    graph = encoders.get(ENCODER, ImageEncoder)._graph
    counted = Counted(graph._runner, PIXELS)
    monkeypatch.setattr(graph, "_runner", counted)
    return counted


def counted(pipeline: SteppedPipeline) -> tuple[Counted, Counted]:
    """Counts the denoiser's calls of the plain graph and of the control graph."""
    pipeline.open_control()
    plain, control = pipeline._denoiser._graph, pipeline._denoiser.control.opened
    plain._runner, control._runner = Counted(plain._runner), Counted(control._runner)
    return plain._runner, control._runner


def test_one_call_serves_rows_with_and_without_image_prompts(model: Callable[..., Model]) -> None:
    """The plain graph runs if no image prompt has an effect: PNDM makes 4 calls at these settings."""
    known = model("sd1")
    plain, control = counted(known.pipeline)
    together(known.pipeline, known.requests([(), MIXES[3]]))
    assert (plain.rows, control.rows) == ([4] * 4, [])
    together(known.pipeline, known.requests([(), MIXES[1], MIXES[2]]))
    assert (plain.rows, control.rows) == ([4] * 4, [6] * 4)


def test_rows_without_image_prompts_stay_in_the_plain_graph_if_the_graphs_have_other_providers(
    model: Callable[..., Model],
) -> None:
    known = model("sd1")
    batch = known.requests([MIXES[1], (), MIXES[2]])
    expected = together(known.pipeline, batch)
    plain, control = counted(known.pipeline)
    known.pipeline._denoiser.control.mixes = False
    assert all(np.array_equal(*pair) for pair in zip(together(known.pipeline, batch), expected, strict=True))
    assert (plain.rows, control.rows) == ([2] * 4, [4] * 4)


def test_images_are_encoded_again_by_another_version_of_the_image_encoder(
    model: Callable[..., Model], encoded: Counted, encoders: Companions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image encoder in memory counts: on a replica of Ray it may differ from the front's."""
    known = model("sd1")
    batch = known.requests([MIXES[1]])
    together(known.pipeline, batch)
    monkeypatch.setattr(encoders.get(ENCODER, ImageEncoder), "digest", "another version")
    together(known.pipeline, batch)
    assert len(encoded.rows) == 4, "the image and no image, twice"


def test_images_are_encoded_once_for_all_requests_of_a_scope(
    model: Callable[..., Model], adapters: Get, encoded: Counted, tmp_path: Path
) -> None:
    """The prepared image prompt stays in the cache, even without the adapter's file."""
    shutil.copytree(adapters("sd1"), tmp_path / "own")
    known = model("sd1", tmp_path / "own")
    batch = known.requests([MIXES[4], MIXES[1], MIXES[4]])
    first = together(known.pipeline, batch)
    assert len(encoded.rows) == 5, "a and b, no image, c, and no image for the other adapter"
    shutil.rmtree(tmp_path / "own")
    assert all(np.array_equal(*pair) for pair in zip(together(known.pipeline, batch), first, strict=True))
    assert len(encoded.rows) == 5
    together(known.pipeline, [dataclasses.replace(batch[1], cache_scope="another client")])
    assert len(encoded.rows) == 6


def test_an_adapter_larger_than_the_cache_is_read_once_for_all_images_of_a_prompt(
    bundle: Get, adapters: Get, encoders: Companions, caplog: pytest.LogCaptureFixture
) -> None:
    files = ImageAdapterFiles(adapters("sd1"))
    pipeline = load(bundle("sd1"), encoders, image_adapters=ImageAdapterSettings(files, Cache(1)))
    (request,) = Model("sd1", pipeline, files).requests([MIXES[2]])
    with caplog.at_level(logging.INFO):
        pipeline.plan(request)
        alone(pipeline, request)
    assert caplog.text.count("image adapter 'plus' was read") == 2, "to check it, and for three images and no image"
    assert "image adapter 'plus' is larger than the cache (--image-adapter-cache)" in caplog.text


def test_an_adapter_that_was_replaced_is_refused(model: Callable[..., Model], adapters: Get, tmp_path: Path) -> None:
    shutil.copytree(adapters("sd1"), tmp_path / "own")
    known = model("sd1", tmp_path / "own")
    before = known.requests([MIXES[1]])[0]
    shutil.copy(tmp_path / "own" / "full.safetensors", tmp_path / "own" / "plain.safetensors")
    with pytest.raises(
        InvalidField,
        match=r"^image_prompts\[0\].adapter: image adapter 'plain' was replaced after the request had arrived: send it again",
    ):
        known.pipeline.plan(before)
    alone(known.pipeline, known.requests([MIXES[1]])[0])


def test_an_adapter_of_another_model_is_refused(model: Callable[..., Model], adapters: Get) -> None:
    known = model("sd1", adapters("sdxl"))
    with pytest.raises(
        InvalidField, match=r"^image_prompts\[0\].adapter: image adapter 'plus' does not fit the model: it is for "
    ):
        known.pipeline.plan(known.requests([MIXES[2]])[0])


def test_an_image_encoder_of_other_widths_is_refused(model: Callable[..., Model]) -> None:
    known = model("sd1")
    (request,) = known.requests([MIXES[4]])
    first, second = request.image_prompts
    with pytest.raises(
        InvalidField,
        match=r"^image_prompts\[1\].adapter: image adapter 'plus' needs an image encoder with hidden states of 32 numbers: 'g'",
    ):
        known.pipeline.plan(dataclasses.replace(request, image_prompts=(first, dataclasses.replace(second, encoder="g"))))
    with pytest.raises(ModelNotLoaded, match="image encoder 'a' is not loaded"):
        known.pipeline.plan(dataclasses.replace(request, image_prompts=(dataclasses.replace(first, encoder="a"),)))


def test_an_adapter_whose_numbers_overflow_fails_its_own_requests_only(
    model: Callable[..., Model], adapters: Get, tmp_path: Path
) -> None:
    shutil.copytree(adapters("sd1"), tmp_path / "own")
    tensors = load_file(tmp_path / "own" / "plus.safetensors")
    save_file(
        {name: 1e30 * tensor if "to_k" in name else tensor for name, tensor in tensors.items()},
        tmp_path / "own" / "plus.safetensors",
    )
    known = model("sd1", tmp_path / "own")
    batch = known.requests([MIXES[1], MIXES[2], ()])
    engine = Engine({"m": known.pipeline})
    callers = [Caller(engine) for _ in batch]
    for request, caller in zip(batch, callers, strict=True):
        engine.submit(request, caller.events.append)
    while engine.step():
        pass
    first, failed, last = (caller.endings[0] for caller in callers)
    assert isinstance(failed, Failed)
    for request, ending in ((batch[0], first), (batch[2], last)):
        assert isinstance(ending, Completed)
        assert np.array_equal(np.asarray(ending.images[0], int), alone(known.pipeline, request))


@pytest.mark.parametrize(("mix", "index", "tokens"), [(MIXES[2], 0, 15), (MIXES[5], 0, 17), (MIXES[4], 0, 8)])
def test_image_prompts_of_more_tokens_than_memory_is_for_are_refused(
    mix: Mix, index: int, tokens: int, model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = model("sd1")
    (request,) = known.requests([mix])
    width = states_width(layer_widths(known.pipeline._denoiser.config))
    monkeypatch.setattr(image_prompts, "_MOST_NUMBERS", len(mix) * tokens * width)
    known.pipeline.plan(request)
    monkeypatch.setattr(image_prompts, "_MOST_NUMBERS", len(mix) * tokens * width - 1)
    reason = f"the adapter makes {tokens} tokens of them, and this model takes {tokens - 1} in each of {len(mix)} image prompts"
    with pytest.raises(InvalidField, match=rf"^image_prompts\[{index}\].images: {reason}"):
        known.pipeline.plan(request)


@pytest.mark.parametrize(
    ("name", "folder", "reason"),
    [
        ("sd3", True, "it is of the family stable-diffusion-3, for which there are no image adapters"),
        ("pix2pix", True, "it runs as a whole, not step by step"),
        ("sd1", False, "it was loaded without a folder of image adapters"),
    ],
)
def test_models_without_image_prompts_refuse_them(
    name: str, folder: bool, reason: str, bundle: Get, model: Callable[..., Model], encoders: Companions
) -> None:
    known = model("sd1")
    settings = ImageAdapterSettings(known.adapters, Cache(0)) if folder else None
    path = bundle(name)
    pipeline = load_pipeline(path, read_manifest(path), Execution("cpu"), companions=encoders, image_adapters=settings)
    assert not IMAGE_PROMPTS.keys() & pipeline.fields.keys()
    assert IMAGE_PROMPTS.keys() <= known.pipeline.fields.keys()
    with pytest.raises(InvalidField, match=f"^image_prompts: this model takes no image prompts: {reason}"):
        pipeline.plan(known.requests([MIXES[1]])[0])
    pipeline.close()


def test_server_images_match_diffusers(
    bundle: Get,
    image_encoder_bundle: Get,
    adapters: Get,
    model: Callable[..., Model],
    oracle: Callable[..., np.ndarray],
    tmp_path: Path,
) -> None:
    """Requests with other image prompts at the same time. Neither the image encoder nor the control graph is open before."""
    for name, found in (("sd1", bundle("sd1")), ("h", image_encoder_bundle("h")), ("g", image_encoder_bundle("g"))):
        (tmp_path / name).symlink_to(found)
    settings = {"default_model": "sd1", "execution": Execution("cpu"), "image_adapters": ImageAdapterFolder(adapters("sd1"))}
    with (
        running_backend(local, models=tmp_path, **settings) as server,
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
    ):
        stub = ImageToImageServiceStub(channel)

        def ask(index: int) -> np.ndarray:
            mix = [
                pb.ImagePrompt(adapter=name, images=[pb.ImageSource(data=png_of(image_of(one))) for one in letters], scale=scale)
                for name, letters, scale in MIXES[index]
            ]
            source = pb.ImageSource(data=png_of(sample_image(64, 64)))
            result = stub.Transform(pb.TransformRequest(image=source, image_prompts=mix, seed=5 + index, **SETTINGS))
            return np.asarray(Image.open(io.BytesIO(result.images[0].data)), int)

        with ThreadPoolExecutor(len(MIXES)) as pool:
            drawn = list(pool.map(ask, range(len(MIXES))))
        (known,) = (one for one in ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest()).models if one.id == "sd1")
    for index, image in enumerate(drawn):
        assert matches(image, oracle(model("sd1"), MIXES[index], 5 + index)), MIXES[index]
    assert list(known.image_adapters) == ["full", "plain", "plus"]
    assert IMAGE_PROMPTS.keys() <= {field.name for field in known.fields}
