"""Pipeline classes that are refused before any weights are read, and the classes that replace others."""

import json
from contextlib import nullcontext
from pathlib import Path

import diffusers
import pytest
import transformers
from diffusers.pipelines.auto_pipeline import AUTO_IMAGE2IMAGE_PIPELINES_MAPPING
from img2img_export.convert.models import plan, plans_for
from img2img_export.errors import ExportError
from img2img_export.read.checkpoint import Layout
from img2img_export.read.layout_checks import own_class, refuse_configurations
from img2img_server.runtime.common.processors import loadable

CONTROLLED = r"this pipeline \(\w+\) needs a control image \(control_image\), which img2img does not support for this class"
OF_ITS_OWN = r"this pipeline \(\w+\) is a model with a ControlNet, which becomes a bundle of its own: export the plain model"
REFUSED = {
    "StableDiffusionControlNetPipeline": OF_ITS_OWN,
    "StableDiffusionControlNetImg2ImgPipeline": OF_ITS_OWN,
    "StableDiffusionXLControlNetPipeline": OF_ITS_OWN,
    "StableDiffusionXLControlNetUnionPipeline": OF_ITS_OWN,
    "FluxControlNetImg2ImgPipeline": OF_ITS_OWN + ", with --control-graphs, and the ControlNet's directory",
    "StableDiffusion3ControlNetPipeline": CONTROLLED,
    "StableDiffusionDepth2ImgPipeline": r"needs a depth map \(depth_map\)",
    "QwenImageLayeredPipeline": "divides an image into layers",
}


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("StableDiffusionInpaintPipeline", "stable-diffusion-inpainting"),
        ("StableDiffusionXLInpaintPipeline", "stable-diffusion-xl-inpainting"),
    ],
)
def test_inpainting_models_are_exported_as_their_own_class(name: str, family: str) -> None:
    found = plan(Layout(name, {"unet": ("diffusers", "UNet2DConditionModel")}, ()), "auto")
    assert (found.pipeline_class, found.family, found.backend) == (name, family, "onnx")


def test_flux_fill_is_exported_as_its_own_class() -> None:
    found = plan(Layout("FluxFillPipeline", {"transformer": ("diffusers", "FluxTransformer2DModel")}, ()), "auto")
    assert (found.pipeline_class, found.family, found.backend) == ("FluxFillPipeline", "flux-fill", "onnx")


@pytest.mark.parametrize(("channels", "expected"), [(4, "StableDiffusionPipeline"), (9, "StableDiffusionInpaintPipeline")])
def test_inpainting_models_are_detected_by_the_unet_input_channels(tmp_path: Path, channels: int, expected: str) -> None:
    for name, config in {"unet": {"in_channels": channels}, "vae": {"latent_channels": 4}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    refuse_configurations(tmp_path, "StableDiffusionInpaintPipeline", ("unet", "vae"))
    assert own_class(tmp_path, "StableDiffusionInpaintPipeline") == expected
    assert own_class(tmp_path, "StableDiffusionXLPipeline") == "StableDiffusionXLPipeline"


@pytest.mark.parametrize("name", REFUSED)
def test_pipelines_with_other_inputs_or_outputs_are_refused_by_name(name: str) -> None:
    with pytest.raises(ExportError, match=REFUSED[name]):
        plan(Layout(name, {}, ()), "auto")


def test_every_auto_pipeline_class_is_planned_or_refused() -> None:
    refused = set()
    for key, kind in AUTO_IMAGE2IMAGE_PIPELINES_MAPPING.items():
        layout = Layout(kind.__name__, {"unet": ("diffusers", "UNet2DConditionModel")}, ())
        try:
            assert plan(layout, "auto").pipeline_class == kind.__name__
        except ExportError:
            refused.add(key)
    of_their_own = {"stable-diffusion-controlnet", "stable-diffusion-xl-controlnet", "stable-diffusion-xl-controlnet-union"}
    assert refused == of_their_own | {"flux-controlnet", "qwenimage-layered"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ChromaPipeline", "ChromaImg2ImgPipeline"),
        ("SanaSprintPipeline", "SanaSprintImg2ImgPipeline"),
        ("LongCatImageEditPipeline", "LongCatImageEditPipeline"),
        ("QwenImage21Pipeline", "QwenImage21Pipeline"),
        ("StableDiffusionPAGPipeline", "StableDiffusionPAGImg2ImgPipeline"),
        ("KandinskyV22CombinedPipeline", "KandinskyV22Img2ImgCombinedPipeline"),
        ("FluxControlPipeline", "FluxControlImg2ImgPipeline"),
        ("FluxControlInpaintPipeline", "FluxControlImg2ImgPipeline"),
        ("StableDiffusionXLControlNetPAGPipeline", "StableDiffusionXLControlNetPAGImg2ImgPipeline"),
    ],
)
def test_a_text_to_image_class_is_served_by_its_image_to_image_class(name: str, expected: str) -> None:
    assert hasattr(diffusers, expected)
    assert plan(Layout(name, {}, ()), "torch").pipeline_class == expected


def test_flux_control_is_stepped_by_the_engine() -> None:
    found = plan(Layout("FluxControlPipeline", {"transformer": ("diffusers", "FluxTransformer2DModel")}, ()), "auto")
    assert (found.family, found.backend) == ("flux-control", "onnx")


@pytest.mark.parametrize(
    ("name", "channels", "reason"),
    [
        ("FluxControlPipeline", 128, ""),
        ("FluxControlPipeline", 64, "takes 64 channels, but FluxControlPipeline provides 128: the latents of an image and of a"),
        ("FluxPipeline", 128, r"\(128 input channels\): its model_index.json .* must name FluxControlPipeline"),
        ("FluxPipeline", 64, ""),
    ],
)
def test_the_channels_of_flux_are_those_of_its_class(tmp_path: Path, name: str, channels: int, reason: str) -> None:
    transformer = {"_class_name": "FluxTransformer2DModel", "in_channels": channels}
    for folder, config in {"transformer": transformer, "vae": {"latent_channels": 16}}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=reason) if reason else nullcontext():
        refuse_configurations(tmp_path, name, ("transformer", "vae"))


def test_perturbed_attention_runs_in_pytorch_with_the_reason() -> None:
    layout = Layout("StableDiffusionPAGImg2ImgPipeline", {"unet": ("diffusers", "UNet2DConditionModel")}, ())
    (only,) = plans_for(layout, "auto")
    assert only.backend == "torch"
    assert "exchanges the attention layers of its denoiser during a call" in str(only.reason)
    for backend in ("onnx", "hybrid"):
        with pytest.raises(ExportError, match="exchanges the attention layers"):
            plan(layout, backend)


def test_processors_load_without_video_dependencies() -> None:
    """torchvision is not installed here, as on a server: transformers' own class would ask for it."""
    kind = loadable(transformers.Qwen2VLProcessor)
    assert issubclass(kind, transformers.Qwen2VLProcessor)
    assert (kind.__name__, kind.get_attributes()) == ("Qwen2VLProcessor", ["image_processor", "tokenizer"])
    assert loadable(transformers.CLIPTokenizer) is transformers.CLIPTokenizer
    with pytest.raises(ImportError, match="PixtralProcessor needs torchvision, which is not installed: install it"):
        loadable(transformers.PixtralProcessor)
