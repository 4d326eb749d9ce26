"""CLIP's image encoder on a server: its outputs, and that only other models' requests use it."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from fakes import make_request
from img2img_client import Client, InvalidRequest
from img2img_export.verify.images import sample_image
from img2img_server.api.controls import check_controlnet
from img2img_server.backends.local import local
from img2img_server.bundle.image_encoders import FAMILY, EncoderWidths
from img2img_server.bundle.manifest import read_manifest
from img2img_server.errors import BundleError, InvalidField, ModelNotLoaded
from img2img_server.images.sizes import centered_square
from img2img_server.models.registry import Model, ModelRegistry
from img2img_server.runtime.companions import Companions
from img2img_server.runtime.control.nets import ControlNet
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.image_encoders import ImageEncoder, pixels
from img2img_server.runtime.loader import load_pipeline
from PIL import Image
from running import running_backend
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

Get = Callable[[str], Path]
SIZES = [(28, 28), (61, 40), (40, 61), (29, 300), (1, 1), (3, 190), (512, 333)]


def sample(size: tuple[int, int]) -> Image.Image:
    """Noise: every pixel counts."""
    width, height = size
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("side", [28, 224])
@pytest.mark.parametrize("size", SIZES)
def test_pixels_match_transformers_to_1e_6(size: tuple[int, int], side: int) -> None:
    """With the settings that diffusers makes for an image encoder."""
    image = sample(size)
    expected = CLIPImageProcessor(size=side, crop_size=side)(image, return_tensors="np")["pixel_values"][0]
    found = pixels(image, side)
    assert found.shape == (3, side, side)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_image_of_extreme_aspect_ratio_is_not_enlarged() -> None:
    """224 x 224 times 20000 pixels would be 3 GB."""
    assert centered_square(Image.new("RGB", (1, 20_000), "red"), 224).size == (224, 224)


@pytest.fixture
def encoder(image_encoder_bundle: Get) -> ImageEncoder:
    return open_encoder(image_encoder_bundle("h"), Companions())


def open_encoder(bundle: Path, companions: Companions) -> ImageEncoder:
    encoder = load_pipeline(bundle, read_manifest(bundle), Execution("cpu"), companions=companions)
    assert isinstance(encoder, ImageEncoder)
    return encoder


def test_images_are_encoded_as_diffusers_does(encoder: ImageEncoder, tiny_image_encoder: Get, image_encoder_bundle: Get) -> None:
    """Also for the empty image, for both kinds of adapters."""
    model = CLIPVisionModelWithProjection.from_pretrained(tiny_image_encoder("h"))
    side = model.config.image_size
    pipe = StableDiffusionImg2ImgPipeline.__new__(StableDiffusionImg2ImgPipeline)
    parts = {"image_encoder": model, "feature_extractor": CLIPImageProcessor(size=side, crop_size=side)}
    vars(pipe).update(parts)
    images = [sample(size) for size in SIZES]
    embeds, states = encoder.encode(images)
    assert states.shape[1] == encoder.tokens
    no_embeds, no_states = encoder.encode_nothing()
    with torch.no_grad():
        expected, nothing = pipe.encode_image(images, "cpu", 1)
        expected_states, nothing_states = pipe.encode_image(images, "cpu", 1, output_hidden_states=True)
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(states, expected_states, rtol=0, atol=1e-5)
    torch.testing.assert_close(no_embeds, nothing[:1], rtol=0, atol=0)
    torch.testing.assert_close(no_states, nothing_states[:1], rtol=0, atol=1e-5)
    assert float((states[0] - states[1]).abs().max()) > 0.1
    assert (encoder.projection_dim, encoder.hidden_size) == (embeds.shape[-1], states.shape[-1]) == (24, 32)
    assert encoder.digest == read_manifest(image_encoder_bundle("h")).digest


def test_image_encoding_does_not_depend_on_the_batch(encoder: ImageEncoder) -> None:
    images = [sample(size) for size in SIZES]
    together, alone = encoder.encode(images), [encoder.encode([image]) for image in images]
    for index in (0, 1):
        assert torch.equal(together[index], torch.cat([one[index] for one in alone]))


def test_the_servers_trial_calls_the_graph(encoder: ImageEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    states = encoder.prepare([make_request(image=sample_image(*encoder.native_size))])
    encoder.advance(states, encoder.denoise(states))
    assert encoder.finish(states)[0][0].size == encoder.native_size
    monkeypatch.setattr(encoder, "trial_inputs", lambda *size: {"pixel_values": torch.full((1, 3, 28, 28), torch.nan)})
    with pytest.raises(FloatingPointError, match="the outputs of the image encoder have values that are not finite"):
        encoder.denoise(states)


def test_companions_are_found_by_their_id_and_kind_until_they_are_closed(image_encoder_bundle: Get) -> None:
    known = Companions()
    encoder = open_encoder(image_encoder_bundle("h"), known)
    assert known.get("h", ImageEncoder) is encoder
    with pytest.raises(ModelNotLoaded, match="ControlNet 'h' is not loaded"):
        known.get("h", ControlNet)
    again = open_encoder(image_encoder_bundle("h"), known)
    encoder.close()
    assert known.get("h", ImageEncoder) is again, "it was replaced before"
    again.close()
    with pytest.raises(ModelNotLoaded, match="image encoder 'h' is not loaded"):
        known.get("h", ImageEncoder)


@pytest.fixture(scope="module")
def client(image_encoder_bundle: Get, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a server with two image encoders, neither loaded at start."""
    models = tmp_path_factory.mktemp("models")
    for name, letter in {"clip": "h", "wide": "g"}.items():
        (models / name).symlink_to(image_encoder_bundle(letter))
    with (
        running_backend(local, models=models, execution=Execution("cpu")) as server,
        Client(f"localhost:{server.port}", timeout=120) as client,
    ):
        yield client


def test_an_image_encoder_is_listed_loaded_and_unloaded_like_a_model(client: Client) -> None:
    loaded = client.load_model("clip")
    assert (loaded.family, loaded.state, loaded.engine) == (FAMILY, "ready", "onnx:cpu")
    assert loaded.memory_bytes
    assert (loaded.fields, loaded.controlnets, loaded.schedulers) == ((), (), ())
    client.unload_model("clip")
    assert {model.id: (model.state, model.is_default) for model in client.models()} == {
        "clip": ("unloaded", False),
        "wide": ("unloaded", False),
    }


def test_request_to_an_image_encoder_is_refused_with_an_explanation(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="'clip' is an image encoder, which other models' requests"):
        client.transform(sample_image(64, 64), model="clip")


def test_an_image_encoder_is_neither_a_default_model_nor_a_controlnet(image_encoder_bundle: Get) -> None:
    encoder = Model("clip", read_manifest(image_encoder_bundle("h")))
    model = replace(encoder, id="model", manifest=replace(read_manifest(image_encoder_bundle("h")), family="stable-diffusion"))
    assert ModelRegistry([encoder, model]).default == "model"
    with pytest.raises(InvalidField, match="'clip' is not a ControlNet, but of the family image-encoder"):
        check_controlnet(encoder, model, "controls[0].model")


def test_widths_are_known_without_loading(control_bundle: Get, image_encoder_bundle: Get, tmp_path: Path) -> None:
    for name, path in {
        "net": control_bundle("sd1-a"),
        "clip": image_encoder_bundle("h"),
        "wide": image_encoder_bundle("g"),
    }.items():
        (tmp_path / name).symlink_to(path)

    def load(path: Path, manifest: object) -> object:
        raise AssertionError("nothing is loaded")

    registry = ModelRegistry.find_bundles(tmp_path, load)  # type: ignore[arg-type]
    found = {model.id: model.encoder_widths for model in registry}
    assert found == {"net": None, "clip": EncoderWidths(24, 32), "wide": EncoderWidths(40, 48)}
    assert [model.id for model in registry if model.manifest and model.manifest.family == FAMILY] == ["clip", "wide"]


def test_a_graph_of_something_else_is_refused() -> None:
    class Other:
        input_types = {"sample": torch.float32}

    config = {"image_size": 28, "patch_size": 7, "projection_dim": 24, "hidden_size": 32}
    with pytest.raises(BundleError, match="graph has no input pixel_values"):
        ImageEncoder(Other(), config, "", "onnx:cpu", "cpu")  # type: ignore[arg-type]
