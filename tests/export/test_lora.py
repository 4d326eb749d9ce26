"""LoRAs become part of the weights: by the formula, and as diffusers itself fuses them."""

import dataclasses
import hashlib
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, LCMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from fakes import make_request
from img2img_export.build import export_model
from img2img_export.errors import ExportError
from img2img_export.options import ExportOptions, LoraFile
from img2img_export.progress import Progress
from img2img_export.read import lora
from img2img_export.read.source import fill_tree, resolve
from img2img_export.verify.images import sample_image
from img2img_server.bundle.manifest import Lora
from img2img_server.engine.request import run_alone
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from lora_making import CONVOLUTIONS, TARGETS, Pairs, Weights, make, weights_of, write_diffusers, write_kohya
from safetensors.torch import load_file, save_file
from short_exports import cut_short

Get = Callable[[str], Path]


pytestmark = pytest.mark.usefixtures("empty_cache")


def fused(model: Path, *terms: tuple[Pairs, float | Callable[[str], float]]) -> Weights:
    """The weights by the formula. A term's number is scale * alpha / rank, or a function of the module that gives it."""
    weights = weights_of(model)
    for pairs, factor in terms:
        for module, (down, up) in pairs.items():
            number = factor if isinstance(factor, float) else factor(module)
            weight = weights[f"{module}.weight"]
            delta = (number * up.flatten(1).double() @ down.flatten(1).double()).reshape(weight.shape)
            weights[f"{module}.weight"] = (weight.double() + delta).to(weight.dtype)
    return weights


def fuse(model: Path, directory: Path, *loras: LoraFile, variant: str | None = None) -> tuple[Path, tuple[Lora, ...]]:
    options = ExportOptions(source=str(model), output=Path("unused"), loras=loras, variant=variant)
    directory.mkdir()
    return directory, fill_tree(resolve(options, Progress()), options, directory, Progress())[1]


def assert_close(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        worst = (found[name].double() - value.double()).abs().max() / max(1.0, float(value.abs().max()))
        assert worst < 1e-6, (name, worst)


def by_diffusers(kind: Any, model: Path, path: Path, scale: float) -> Weights:
    """The weights after diffusers' own load_lora_weights and fuse_lora."""
    pipeline = kind.from_pretrained(model, use_safetensors=True, local_files_only=True)
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    pipeline.fuse_lora(lora_scale=scale)
    pipeline.unload_lora_weights()
    parts = [(name, part) for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)]
    return {f"{name}.{key}": value for name, part in parts for key, value in part.state_dict().items()}


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@pytest.mark.parametrize("trainer", ["diffusers", "kohya"])
def test_merged_weights_match_the_formula_and_diffusers(name: str, trainer: str, tiny_model: Get, tmp_path: Path) -> None:
    model, path, pairs = tiny_model(name), tmp_path / "style.safetensors", make(tiny_model(name), 1)
    write_diffusers(pairs, path) if trainer == "diffusers" else write_kohya(pairs, path, lambda module: 2.0)
    found, recorded = fuse(model, tmp_path / "view", LoraFile(path, 0.7))
    assert recorded == (Lora("style.safetensors", 0.7, hashlib.sha256(path.read_bytes()).hexdigest()),)
    assert recorded == lora.records([LoraFile(path, 0.7)])
    assert_close(weights_of(found), fused(model, (pairs, 0.7 if trainer == "diffusers" else 0.7 * 2 / 4)))
    kind = StableDiffusionPipeline if name == "sd1" else StableDiffusionXLPipeline
    assert_close(weights_of(found), by_diffusers(kind, model, path, 0.7))


def test_each_layer_has_its_own_alpha_and_rank(tiny_model: Get, tmp_path: Path) -> None:
    """diffusers 0.39 takes the most frequent ones for many layers."""
    model, ranks = tiny_model("sd1"), (2, 4, 8)
    pairs = make(model, 1, (*TARGETS, *CONVOLUTIONS), ranks)

    def alpha(module: str) -> float:
        return 1.0 if "to_q" in module else 3.0

    def factor(module: str) -> float:
        return alpha(module) / len(pairs[module][0])

    assert any(up.ndim == 4 for _, up in pairs.values())
    kohya = write_kohya(pairs, tmp_path / "kohya.safetensors", alpha)
    assert_close(weights_of(fuse(model, tmp_path / "a", LoraFile(kohya))[0]), fused(model, (pairs, factor)))
    plain = write_diffusers(pairs, tmp_path / "plain.safetensors")
    assert_close(weights_of(fuse(model, tmp_path / "b", LoraFile(plain))[0]), fused(model, (pairs, 1.0)))


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_configuration_in_the_file_is_applied(rslora: bool, tiny_model: Get, tmp_path: Path) -> None:
    model = tiny_model("sd1")
    pairs = {module: pair for module, pair in make(model, 1).items() if module.startswith("unet.")}
    config = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 6}, "unet.use_rslora": rslora}
    path = write_diffusers(pairs, tmp_path / "style.safetensors", config)

    def factor(module: str) -> float:
        return (6 if module.endswith("attn1.to_q") else 8) / (2 if rslora else 4)

    assert_close(weights_of(fuse(model, tmp_path / "view", LoraFile(path))[0]), fused(model, (pairs, factor)))


@pytest.mark.parametrize(
    "config",
    [[1], {"unet.lora_alpha": "much"}, {"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 2}},
     {"unet.lora_alpha": 1, "unet.alpha_pattern": {"(.+)+x": 2}}, {"unet.lora_alpha": 1, "unet.alpha_pattern": {".*.*.*x": 2}}],
)  # fmt: skip
def test_a_damaged_configuration_is_refused(config: Any, tiny_model: Get, tmp_path: Path) -> None:
    path = write_diffusers(make(tiny_model("sd1"), 1), tmp_path / "style.safetensors", config)
    with pytest.raises(ExportError, match="is not a LoRA that diffusers can read"):
        fuse(tiny_model("sd1"), tmp_path / "view", LoraFile(path))


def test_several_loras_are_merged_in_any_order(tiny_model: Get, tmp_path: Path) -> None:
    model = tiny_model("sd1")
    one, two = make(model, 1), make(model, 2, ("to_q", "proj_in"), (2,))
    first = LoraFile(write_kohya(one, tmp_path / "one.safetensors", lambda module: 4.0), 0.5)
    second = LoraFile(write_diffusers(two, tmp_path / "two.safetensors"), -1.5)
    expected = fused(model, (one, 0.5), (two, -1.5))
    assert_close(weights_of(fuse(model, tmp_path / "there", first, second)[0]), expected)
    assert_close(weights_of(fuse(model, tmp_path / "back", second, first)[0]), expected)


def test_only_changed_files_are_written_and_never_the_source(tiny_model: Get, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model("sd1"), tmp_path / "model"))
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    pairs = {module: pair for module, pair in make(model, 1).items() if module.startswith("unet.")}
    found, _ = fuse(model, tmp_path / "view", LoraFile(write_diffusers(pairs, tmp_path / "style.safetensors")))
    written = [path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file() and not path.is_symlink()]
    assert written == ["unet/diffusion_pytorch_model.safetensors"]
    assert {path: path.read_bytes() for path in model.rglob("*") if path.is_file()} == before


def test_variants_and_shards_are_preserved(tiny_model: Get, tmp_path: Path) -> None:
    """The sum is made in fp32 and rounded once, into the precision that was stored."""
    half = AutoPipelineForImage2Image.from_pretrained(tiny_model("sd1"), torch_dtype=torch.float16, use_safetensors=True)
    half.save_pretrained(tmp_path / "half", variant="fp16", max_shard_size="100KB")
    model, pairs = tmp_path / "half", make(tmp_path / "half", 1)
    assert len(list(model.glob("unet/*.fp16-*.safetensors"))) > 1
    loras = [LoraFile(write_diffusers(pairs, tmp_path / "style.safetensors"), scale) for scale in (0.3, 0.4)]
    found, _ = fuse(model, tmp_path / "view", *loras, variant="fp16")
    expected = fused(model, (pairs, 0.7))
    made = weights_of(found)
    for name, value in made.items():
        assert value.dtype == torch.float16
        assert torch.allclose(value, expected[name], rtol=2**-10, atol=2**-14), name
    loaded = AutoPipelineForImage2Image.from_pretrained(found, variant="fp16", use_safetensors=True, local_files_only=True)
    assert all(torch.equal(value, made[f"unet.{name}"].float()) for name, value in loaded.unet.state_dict().items())


def damage(pairs: Pairs, path: Path, how: str) -> Path:
    tensors = load_file(write_diffusers(pairs, path))
    down = next(name for name in tensors if name.startswith("unet.") and name.endswith("lora_A.weight"))
    up, two = down.replace("lora_A", "lora_B"), torch.ones(2, 2)
    damaged: dict[str, Weights] = {
        "another component": {"text_encoder_2.x.lora_A.weight": two, "text_encoder_2.x.lora_B.weight": two.clone()},
        "no prefix": {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith("unet.")},
        "an unknown layer": {**tensors, "unet.no.such.lora_A.weight": two, "unet.no.such.lora_B.weight": two.clone()},
        "another width": {**tensors, down: torch.ones(4, 7)},
        "another rank": {**tensors, down: torch.ones(3, tensors[down].shape[1])},
        "half a pair": {name: value for name, value in tensors.items() if name != up},
        "a DoRA": {**tensors, down.replace("lora_A.weight", "dora_scale"): two},
        "an alpha of nothing": {**tensors, "unet.conv_in.alpha": torch.tensor(1.0)},
        "an alpha that is NaN": {**tensors, down.replace("lora_A.weight", "alpha"): torch.tensor(math.nan)},
        "an infinite alpha": {**tensors, down.replace("lora_A.weight", "alpha"): torch.tensor(math.inf)},
        "a matrix of NaN": {**tensors, up: torch.full_like(tensors[up], math.nan)},
        "no rank": {**tensors, down: torch.ones(0, 16), up: torch.ones(16, 0), down.replace("lora_A.weight", "alpha"): two[0, 0]},
        "a path": {"../../x.lora_A.weight": two, "../../x.lora_B.weight": two.clone()},
        "an absolute path": {"/etc/x.lora_A.weight": two, "/etc/x.lora_B.weight": two.clone()},
        "a long name": {f"unet.{'x' * 1000}.lora_A.weight": two, f"unet.{'x' * 1000}.lora_B.weight": two.clone()},
        "a large rank": {**tensors, down: torch.ones(200_000, 16), up: torch.ones(15, 200_000)},
        "LoHa": {f"lora_unet_down_blocks_0.hada_w{index}": two.clone() for index in (1, 2)},
        "empty": {},
    }
    save_file(damaged[how], path)
    return path


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("another component", "does not fit the model: it adapts text_encoder_2, "),
        ("no prefix", "does not fit the model: it adapts down_blocks, "),
        ("an unknown layer", "does not fit unet: it adapts no.such.weight"),
        ("another width", r"does not fit unet: .* has shape \(16, 16\) in the model and \(16, 7\)"),
        ("another rank", "does not fit unet"),
        ("half a pair", "not a plain LoRA"),
        ("a DoRA", "not a plain LoRA: it contains .*dora_scale"),
        ("an alpha of nothing", "unet.conv_in.alpha"),
        ("an alpha that is NaN", "NaN or infinite numbers"),
        ("an infinite alpha", "NaN or infinite numbers"),
        ("a matrix of NaN", "NaN or infinite numbers"),
        ("no rank", "is not a LoRA that diffusers can read"),
        ("a path", "does not fit the model: it adapts "),
        ("an absolute path", "does not fit the model: it adapts "),
        ("a long name", "not a plain LoRA: it contains unet.xxx"),
        ("a large rank", r"does not fit unet: .* has shape \(16, 16\) in the model and \(15, 16\)"),
        ("LoHa", "hada_w1"),
        ("empty", "contains no LoRA layers"),
    ],
)
def test_invalid_lora_files_are_refused_and_nothing_is_written(how: str, reason: str, tiny_model: Get, tmp_path: Path) -> None:
    path = damage(make(tiny_model("sd1"), 1), tmp_path / "style.safetensors", how)
    with pytest.raises(ExportError, match=reason) as caught:
        fuse(tiny_model("sd1"), tmp_path / "view", LoraFile(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(file.is_symlink() for file in (tmp_path / "view").rglob("*") if file.is_file())


@pytest.mark.parametrize(
    ("name", "reason"), [("sdxl", "does not fit"), ("refiner", "does not fit"), ("kandinsky22", "does not support LoRAs")]
)
def test_lora_of_another_model_is_refused(name: str, reason: str, tiny_model: Get, tmp_path: Path) -> None:
    path = write_diffusers(make(tiny_model("sd1"), 1), tmp_path / "style.safetensors")
    with pytest.raises(ExportError, match=f"{path}.*{reason}"):
        fuse(tiny_model(name), tmp_path / "view", LoraFile(path))


def test_lora_that_overflows_the_weights_is_refused(tiny_model: Get, tmp_path: Path) -> None:
    """Each matrix is finite, but not the sum. Found by scripts/fuzz."""
    pairs = {name: (1e30 * down, 1e30 * up) for name, (down, up) in make(tiny_model("sd1"), 1).items()}
    path = write_diffusers(pairs, tmp_path / "style.safetensors")
    with pytest.raises(ExportError, match=f"^{path}: what it adds to .* is too large for torch.float32"):
        fuse(tiny_model("sd1"), tmp_path / "view", LoraFile(path))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("style.pt", "pickles can run code"),
        ("none.safetensors", "is not a file"),
        ("style.txt", "is a pickle"),
        ("damaged.safetensors", "is a pickle"),
    ],
)
def test_other_files_than_safetensors_are_refused_without_reading(name: str, reason: str, tmp_path: Path) -> None:
    for file in ("style.pt", "style.txt", "damaged.safetensors"):
        (tmp_path / file).write_bytes(b"\x80\x02}q\x00 a pickle")
    with pytest.raises(ExportError, match=f"{tmp_path / name}.*{reason}"):
        lora.records([LoraFile(tmp_path / name)])


def test_original_block_names_of_sdxl_are_accepted(tiny_model: Get, tmp_path: Path) -> None:
    """kohya trains SDXL on the UNet of its authors: input_blocks, middle_block, output_blocks."""
    model = tiny_model("sdxl")
    wanted = {"down_blocks.1.attentions.0": "input_blocks_3_1", "mid_block.attentions.0": "middle_block_1"}
    wanted["up_blocks.0.attentions.1"] = "output_blocks_1_1"
    pairs: Pairs = {}
    tensors: Weights = {}
    for module, (down, up) in make(model, 1, ("to_q", "ff.net.2")).items():
        for block, first_name in wanted.items():
            if module.startswith(f"unet.{block}."):
                pairs[module] = down, up
                name = f"lora_unet_{first_name}_{module.removeprefix(f'unet.{block}.').replace('.', '_')}"
                tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(4.0)}
    assert {module.split(".")[1] for module in pairs} == {"down_blocks", "mid_block", "up_blocks"}
    save_file(tensors, tmp_path / "style.safetensors")
    found, _ = fuse(model, tmp_path / "view", LoraFile(tmp_path / "style.safetensors"))
    assert_close(weights_of(found), fused(model, (pairs, 1.0)))


def test_bundle_with_lora_and_scheduler_matches_diffusers(tiny_model: Get, tmp_path: Path) -> None:
    """The use of an LCM-LoRA: fused, and with LCM's scheduler in place of the model's own."""
    model = tiny_model("sd1")
    file = write_diffusers(make(model, seed=3), tmp_path / "lcm.safetensors")
    asked = ExportOptions(str(model), tmp_path / "out", loras=(LoraFile(file, 0.1),), scheduler="LCM")
    with cut_short(2):
        manifest = export_model(asked).manifest
    assert [(lora.name, lora.scale) for lora in manifest.loras] == [("lcm.safetensors", 0.1)]
    assert manifest.verification.passed
    assert (manifest.backend, manifest.family) == ("onnx", "stable-diffusion")

    pipeline = AutoPipelineForImage2Image.from_pretrained(model, use_safetensors=True, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"prompt": "a lake", "strength": 0.8, "num_inference_steps": 4, "guidance_scale": 1.0}

    def expected() -> np.ndarray:
        generator = torch.Generator().manual_seed(5)
        return np.asarray(pipeline(image=sample_image(64, 64), generator=generator, **settings).images[0], np.int16)

    without = expected()
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    pipeline.fuse_lora(lora_scale=0.1)
    request = make_request(image=sample_image(64, 64), seeds=(5,), **settings)
    drawn = np.asarray(run_alone(load_pipeline(tmp_path / "out", manifest, Execution("cpu")), request)[0], np.int16)
    assert np.abs(drawn - expected()).max() <= 1
    assert np.abs(drawn - without).mean() > 3

    assert export_model(asked).up_to_date
    with pytest.raises(ExportError, match="--force"):
        export_model(dataclasses.replace(asked, loras=(LoraFile(file, 0.2),)))
