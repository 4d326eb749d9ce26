"""A model in one file: converted to diffusers' layout it has the weights it was made of, each in its stored precision."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoPipelineForImage2Image
from img2img_export.errors import ExportError
from safetensors.torch import load_file, save_file
from single_files import assert_equal, fill, weights_of, write_single_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.fixture
def model(tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a tiny model. If it has two text encoders, they differ in width, by which diffusers distinguishes them."""

    def copy(name: str) -> Path:
        directory = Path(shutil.copytree(tiny_model(name), tmp_path / name))
        if name == "sdxl":
            config = CLIPTextConfig.from_pretrained(directory / "text_encoder_2")
            config.hidden_size, config.projection_dim = 48, 40
            CLIPTextModelWithProjection(config).save_pretrained(directory / "text_encoder_2")
        return directory

    return copy


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "refiner"])
def test_single_file_conversion_restores_the_weights(name: str, model: Callable[[str], Path], tmp_path: Path) -> None:
    template = model(name)
    expected = weights_of(template)
    before = {path: path.read_bytes() for path in template.rglob("*") if path.is_file()}
    found = fill(write_single_file(template, tmp_path / "model.safetensors"), tmp_path / "view", config=str(template))
    assert_equal(weights_of(found), expected)
    assert {path: path.read_bytes() for path in template.rglob("*") if path.is_file()} == before
    texts = {path.relative_to(template) for path in before if path.suffix != ".safetensors"}
    assert texts == {path.relative_to(found) for path in found.rglob("*") if path.is_file() and path.suffix != ".safetensors"}


def test_each_component_keeps_its_precision_and_diffusers_loads_it(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    template = tiny_model("sd1")
    path = write_single_file(template, tmp_path / "model.safetensors")
    kinds = {"model": torch.float16, "first_stage_model": torch.float32, "cond_stage_model": torch.bfloat16}
    save_file({name: value.to(kinds[name.split(".")[0]]) for name, value in load_file(path).items()}, path)
    found = fill(path, tmp_path / "view", config=str(template))
    components = {"unet": torch.float16, "vae": torch.float32, "text_encoder": torch.bfloat16}
    expected = weights_of(template)
    assert_equal(
        weights_of(found),
        {part: {name: value.to(components[part]) for name, value in weights.items()} for part, weights in expected.items()},
    )
    AutoPipelineForImage2Image.from_pretrained(found, use_safetensors=True, local_files_only=True)


@pytest.mark.parametrize(
    ("prefix", "component"), [("model.", "unet"), ("first_stage_model.", "vae"), ("cond_stage_model.", "text_encoder")]
)
@pytest.mark.parametrize("how", ["all", "one"])
def test_missing_weights_are_named(
    how: str, prefix: str, component: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    path = write_single_file(tiny_model("sd1"), tmp_path / "model.safetensors")
    weights = load_file(path)
    gone = [name for name in weights if name.startswith(prefix) and name.endswith("norm1.weight" if how == "one" else "")]
    gone = gone or [name for name in weights if name.startswith(prefix)][-1:]
    save_file({name: value for name, value in weights.items() if name not in gone}, path)
    words = {"unet": "denoiser", "vae": "VAE", "text_encoder": "text encoders"}
    with pytest.raises(ExportError, match=f"{path}.*{words[component] if how == 'all' else component}") as caught:
        fill(path, tmp_path / "view", config=str(tiny_model("sd1")))
    assert "\n" not in str(caught.value)


def test_another_models_template_is_refused(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    path = write_single_file(tiny_model("sd1"), tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match="wrong --config"):
        fill(path, tmp_path / "view", config=str(tiny_model("sdxl")))


def test_model_directory_is_linked_unchanged(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    found = fill(tiny_model("sd1"), tmp_path / "view")
    assert all(path.is_symlink() for path in found.rglob("*") if path.is_file())
    assert_equal(weights_of(found), weights_of(tiny_model("sd1")))
