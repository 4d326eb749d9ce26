"""Preview weights: fitted by the exporter, stored in the manifest, and better than the mean color."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import DEMO_MODEL
from covering import nightly_but
from diffusers import AutoencoderKL, AutoencoderTiny
from img2img_export.verify import latent_preview
from img2img_export.verify.images import sample_image
from img2img_server.bundle.manifest import read_manifest, write_manifest
from img2img_server.runtime.diffusion.preview import draw
from painting import paint
from PIL import Image
from posters import build_geometry, draw_layout
from posterset import UNSEEN_LAYOUTS
from scenes import MOODS

Get = Callable[[str], Path]


def pipeline(model: Path) -> Any:
    """The part of a pipeline that a map needs."""
    name = json.loads((model / "vae" / "config.json").read_text())["_class_name"]
    return SimpleNamespace(vae=getattr(diffusers, name).from_pretrained(model / "vae").eval())


def pixels(image: Image.Image) -> np.ndarray:
    """An RGB image, H x W x 3, 0 to 1."""
    return np.asarray(image.convert("RGB")) / 255


def explained(vae: Any, images: Iterable[np.ndarray], weights: latent_preview.LatentPreview) -> float:
    """How much of the variance of the decoded images' colours their previews explain: 1 for all, 0 for no more than the mean."""
    drawn, wanted = [], []
    for image in images:
        latents = latent_preview.encode(vae, image)
        (preview,) = draw(latents[None], weights)
        assert preview.size == (latents.shape[2], latents.shape[1])
        drawn.append(pixels(preview).reshape(-1, 3))
        wanted.append(latent_preview.decode(vae, latents).permute(1, 2, 0).numpy().reshape(-1, 3))
    colours = np.concatenate(wanted)
    return 1 - float(((np.concatenate(drawn) - colours) ** 2).mean() / ((colours - colours.mean(0)) ** 2).mean())


@pytest.mark.parametrize("name", nightly_but(["sd1", "sdxl", "flux", "klein", "qwenimage"], "sd1", "klein", "qwenimage"))
def test_tiny_model_previews_explain_some_variance(name: str, tiny_model: Get) -> None:
    model = pipeline(tiny_model(name))
    weights = latent_preview.fit(model)
    channels = model.vae.config.get("latent_channels") or model.vae.config.z_dim
    assert [len(row) for row in weights] == [4 * channels + 1] * 3
    if name == "sd1":
        assert weights == latent_preview.fit(model), "the same model gives the same map"
    share = explained(model.vae, latent_preview.crops(np.random.default_rng(1)), weights)
    print(f"{name}: {share:.2f} of the variance")
    assert share > 0


def test_demo_previews_explain_most_of_the_color_variance(bundle: Get) -> None:
    scenes = [build_geometry(draw_layout(seed), 128) for seed in UNSEEN_LAYOUTS[:2]]
    images = [paint(scene, *mood).transpose(1, 2, 0) for scene in scenes for mood in MOODS]
    share = explained(pipeline(DEMO_MODEL).vae, images, read_manifest(bundle("demo")).latent_preview)
    print(f"{share:.2f} of the variance")
    assert share > 0.7


MIXTURE = torch.tensor([[1.0, 0.5, 0.5], [-1.0, 1.0, 0.0], [0.2, 0.2, -1.0], [0.2, 1.7, -0.5]])


class LinearVae(AutoencoderKL):  # type: ignore[misc]
    """Encodes the mean colours of 8 x 8 pixels, mixed into four channels, the last of them the sum of the others."""

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        mixed = torch.einsum("ck,bkhw->bchw", MIXTURE, torch.nn.functional.avg_pool2d(x, 8))
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: mixed + 3))

    def decode(self, z: torch.Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        colours = torch.einsum("kc,bchw->bkhw", torch.linalg.pinv(MIXTURE), z - 3)
        return SimpleNamespace(sample=torch.nn.functional.interpolate(colours, scale_factor=8))


def test_linear_previews_are_fitted_exactly() -> None:
    vae = LinearVae(block_out_channels=(32,), norm_num_groups=32, scaling_factor=0.2, shift_factor=0.7)
    weights = latent_preview.fit(SimpleNamespace(vae=vae))
    assert explained(vae, [pixels(sample_image(120, 72))], weights) > 0.999
    assert max(abs(value) for row in weights for value in row) < 10, "channels that agree share the weight"


def test_latents_are_scaled_as_the_pipeline_scales_them(tiny_model: Get) -> None:
    """A VAE with a mean and a deviation of its own, as SDXL's later ones have: compared with diffusers' prepare_latents."""
    from diffusers import StableDiffusionXLImg2ImgPipeline

    pipe = StableDiffusionXLImg2ImgPipeline.from_pretrained(tiny_model("sdxl"), use_safetensors=True)
    pipe.vae.register_to_config(latents_mean=[0.5, -1.0, 2.0, 0.0], latents_std=[1.5, 0.5, 2.0, 1.0])
    pipe.vae.quant_conv.weight.data[4:] = 0
    pipe.vae.quant_conv.bias.data[4:] = -60  # The log-variance: a distribution that is all but a point.
    image = sample_image(64, 64)
    preprocessed = pipe.image_processor.preprocess(image)
    generator = torch.Generator().manual_seed(0)
    wanted = pipe.prepare_latents(preprocessed, None, 1, 1, torch.float32, "cpu", generator, add_noise=False)
    assert torch.allclose(latent_preview.encode(pipe.vae, pixels(image)), wanted[0], atol=1e-4)


def test_unsupported_autoencoders_have_no_preview_weights() -> None:
    assert latent_preview.fit(SimpleNamespace()) == ()
    assert latent_preview.fit(SimpleNamespace(vae=AutoencoderTiny())) == ()


def test_manifest_has_the_preview_weights_and_loads_without_them(bundle: Get, tmp_path: Path) -> None:
    manifest = read_manifest(bundle("sd1"))
    assert [len(row) for row in manifest.latent_preview] == [17, 17, 17]
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    path = tmp_path / "manifest.json"
    data = json.loads(path.read_text())
    del data["latent_preview"]
    path.write_text(json.dumps(data))
    assert read_manifest(tmp_path).latent_preview == ()


def test_batch_order_is_kept_and_all_latents_give_an_image() -> None:
    statistics = (0.0,) * 6
    weights = ((1.0, 0.0, *statistics, 0.0), (0.0, 1.0, *statistics, 0.25), (0.0, 0.0, *statistics, 0.5))
    latents = torch.zeros(4, 2, 3, 5)
    latents[1, 0], latents[2, 1], latents[3] = 1.0, -9.0, float("nan")
    images = draw(latents, weights)
    assert [(image.mode, image.size) for image in images] == [("RGB", (5, 3))] * 4
    assert [image.getpixel((4, 2)) for image in images] == [(0, 64, 128), (255, 64, 128), (0, 0, 128), (0, 0, 0)]
