"""Single files as people share them: scaled float8, v-prediction, other spellings. Weights come out right, or not at all."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from covering import covering
from diffusers import AutoPipelineForImage2Image
from img2img_export.errors import ExportError
from img2img_export.read.checkpoint import Layout
from img2img_export.read.prediction import apply, sampling_of
from img2img_export.read.source import Checkpoint
from img2img_export.read.weights_file import TensorInfo
from img2img_server.bundle.manifest import Source
from safetensors.torch import load_file, save_file
from single_files import Weights, assert_equal, fill, weights_of, write_single_file

Get = Callable[[str], Path]
UNET = "model.diffusion_model."


pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.fixture
def stored(tiny_model: Get, tmp_path: Path) -> Weights:
    """The tensors of a single file of the tiny Stable Diffusion 1."""
    return load_file(write_single_file(tiny_model("sd1"), tmp_path / "whole.safetensors"))


def convert(
    weights: Weights, template: Path, tmp_path: Path, notes: dict[str, str] | None = None, name: str = "m.safetensors"
) -> Path:
    save_file({key: value.clone().contiguous() for key, value in weights.items()}, tmp_path / name, metadata=notes)
    return fill(tmp_path / name, tmp_path / "view", config=str(template))


def scheduler_of(view: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((view / "scheduler" / "scheduler_config.json").read_text())
    index = json.loads((view / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", config["_class_name"]]
    return config


SCALES: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "one for all": lambda weight, most: weight.abs().max() / most,
    "one in a list": lambda weight, most: (weight.abs().max() / most).reshape(1),
    "one for each row": lambda weight, most: weight.abs().amax(1) / most,
    "a column": lambda weight, most: weight.abs().amax(1, keepdim=True) / most,
    "blocks": lambda weight, most: weight.reshape(2, len(weight) // 2, 2, -1).abs().amax((1, 3)) / most,
}


SPELLINGS = ("scale_weight", "weight_scale", "weight_scale and comfy_quant")


def spread(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if scale.ndim == 2 and scale.shape[1] == 2:
        return scale.repeat_interleave(len(weight) // 2, 0).repeat_interleave(weight.shape[1] // 2, 1)
    return scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(())


@covering(
    kind=[torch.float8_e4m3fn, torch.float8_e5m2], spelling=["scale_weight", "weight_scale", "weight_scale and comfy_quant"]
)
def test_scaled_float8_becomes_weight_times_scale(
    kind: torch.dtype, spelling: str, stored: Weights, tiny_model: Get, tmp_path: Path
) -> None:
    """Each kind of scale in turn, in the attention of the UNet and of the text encoder."""
    suffix = spelling.split()[0]
    made, expected = dict(stored), dict(stored)
    scaled = [name for name, weight in stored.items() if weight.ndim == 2 and re.search(r"attn.*\.weight$", name)]
    for index, name in enumerate(scaled):
        weight, layer = stored[name], name.removesuffix(".weight")
        scale = list(SCALES.values())[index % len(SCALES)](weight, torch.finfo(kind).max)
        made[name] = (weight / spread(scale, weight)).to(kind)
        made[f"{layer}.{suffix}"] = scale
        made[f"{layer}.{'scale_input' if suffix == 'scale_weight' else 'input_scale'}"] = torch.tensor(1.0)
        if "comfy" in spelling:
            text = json.dumps({"format": str(kind).removeprefix("torch.")}).encode()
            made[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
        expected[name] = made[name].float() * spread(scale, weight)
    if suffix == "scale_weight":
        made[f"{UNET}scaled_fp8"] = torch.empty(0, dtype=kind)
    assert len(scaled) > 2 * len(SCALES)
    found = weights_of(convert(made, tiny_model("sd1"), tmp_path))
    (tmp_path / "plain").mkdir()
    assert_equal(found, weights_of(convert(expected, tiny_model("sd1"), tmp_path / "plain")))


def test_scale_of_the_wrong_shape_is_refused(stored: Weights, tiny_model: Get, tmp_path: Path) -> None:
    name = f"{UNET}time_embed.0.weight"
    stored[name] = stored[name].to(torch.float8_e4m3fn)
    stored[name.replace("weight", "scale_weight")] = torch.ones(7)
    with pytest.raises(ExportError, match=r"time_embed\.0\.scale_weight has shape \(7, 1\), which does not fit"):
        convert(stored, tiny_model("sd1"), tmp_path)


QUANTIZED: dict[str, tuple[Weights, dict[str, str], str]] = {
    "nf4": ({"absmax": torch.ones(1), "quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}, {}, "bitsandbytes"),
    "nunchaku": ({"qweight": torch.zeros(2, 2, dtype=torch.int8), "wscales": torch.ones(2)}, {}, "Nunchaku"),
    "nvfp4": ({"weight_scale_2": torch.ones(1)}, {}, "4-bit"),
    "gptq": ({"qzeros": torch.zeros(2, dtype=torch.int32)}, {}, "GPTQ"),
    "integers": ({"weight": torch.zeros(64, 16, dtype=torch.int8)}, {}, "integers"),
    "metadata": ({}, {"_quantization_metadata": json.dumps({"layers": {"x": {"format": "mxfp8"}}})}, "mxfp8"),
}


@pytest.mark.parametrize("how", QUANTIZED)
def test_other_quantization_is_refused_by_name(how: str, stored: Weights, tiny_model: Get, tmp_path: Path) -> None:
    extra, notes, word = QUANTIZED[how]
    weights = {**stored, **{f"{UNET}time_embed.0.{name}": value for name, value in extra.items()}}
    with pytest.raises(ExportError, match=f"quantized .*{word}.*float weights"):
        convert(weights, tiny_model("sd1"), tmp_path, notes)


@pytest.mark.parametrize("kind", ["mxfp8", "int8_tensorwise", None])
def test_a_layer_of_another_format_is_refused(kind: str | None, stored: Weights, tiny_model: Get, tmp_path: Path) -> None:
    name = f"{UNET}time_embed.0.weight"
    text = json.dumps({"format": kind}).encode() if kind else b"?"
    extra = {"weight_scale": torch.ones(()), "comfy_quant": torch.tensor(list(text), dtype=torch.uint8)}
    weights = {**stored, name: stored[name].to(torch.float8_e4m3fn)}
    with pytest.raises(ExportError, match=f"quantized as {kind}: only float8_e4m3fn"):
        convert({**weights, **{f"{UNET}time_embed.0.{key}": value for key, value in extra.items()}}, tiny_model("sd1"), tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([f"{UNET}input_blocks.1.0.in_layers.2.extra"], "a tensor .*in_layers.2.extra"),
        ([f"{UNET}input_blocks.9.0.in_layers.2.weight"], "a tensor .*input_blocks.9.0.in_layers.2.weight"),
        (["first_stage_model.encoder.extra.weight"], "first_stage_model.encoder.extra.weight"),
        (["cond_stage_model.transformer.text_model.encoder.layers.7.mlp.fc1.weight"], "layers.7.mlp.fc1.weight"),
        (["bare.weight"], "bare.weight"),
        (["conditioner.embedders.1.model.ln_final.weight"], "ln_final"),
        ([f"{UNET}time_embed.0.scale_weight"], "time_embed.0.scale_weight"),
        ([f"{UNET}time_embed.0.weight_scales"], "weight_scales"),
        ([f"{UNET}output_blocks.0.0.lora_up.weight"], "lora_up"),
        ([f"{UNET}{number}.weight" for number in range(9)], "9 tensors .*0.weight.* and 5 more"),
        (["edm_means"], "edm_means"),
    ],
)
def test_file_with_unused_weights_is_refused(
    names: list[str], message: str, stored: Weights, tiny_model: Get, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=f"m.safetensors holds .*{message}.*wrong --config") as caught:
        convert({**stored, **dict.fromkeys(names, torch.zeros(3))}, tiny_model("sd1"), tmp_path)
    assert "\n" not in str(caught.value)


HARMLESS = (
    "cond_stage_model.transformer.text_model.embeddings.position_ids", "cond_stage_model.logit_scale", "global_step",
    "cond_stage_model.transformer.text_projection.weight", "model_ema.diffusion_modelinput_blocks00weight", "model_ema.decay",
    "alphas_cumprod", "alphas_cumprod_prev", "betas", "sqrt_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "denoiser.sigmas",
    "log_one_minus_alphas_cumprod", "posterior_variance", "posterior_mean_coef1", "posterior_log_variance_clipped",
    "first_stage_model.loss.discriminator.main.0.weight", "first_stage_model.loss.logvar", "logvar", "lvlb_weights",
)  # fmt: skip


def test_tensors_without_effect_are_omitted(stored: Weights, tiny_model: Get, tmp_path: Path) -> None:
    view = convert({**stored, **dict.fromkeys(HARMLESS, torch.ones(3))}, tiny_model("sd1"), tmp_path)
    assert_equal(weights_of(view), weights_of(tiny_model("sd1")))
    assert scheduler_of(view) == json.loads((tiny_model("sd1") / "scheduler" / "scheduler_config.json").read_text())


def test_unused_last_layer_of_stable_diffusion_2_is_omitted(tiny_model: Get, tmp_path: Path) -> None:
    weights = load_file(write_single_file(tiny_model("sd2"), tmp_path / "whole.safetensors"))
    layer = "cond_stage_model.model.transformer.resblocks.{}.ln_1.weight"
    spare = {layer.format(2): torch.ones(32), "cond_stage_model.model.logit_scale": torch.ones(())}
    projection = {"cond_stage_model.model.text_projection": torch.ones(32, 32), "cond_stage_model.model.attn_mask": torch.ones(7)}
    view = convert({**weights, **spare, **projection}, tiny_model("sd2"), tmp_path)
    assert_equal(weights_of(view), weights_of(tiny_model("sd2")))
    (tmp_path / "other").mkdir()
    with pytest.raises(ExportError, match=r"resblocks.3.ln_1"):
        convert({**weights, layer.format(3): torch.ones(32)}, tiny_model("sd2"), tmp_path / "other")


TRAILING = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
SAID: dict[str, tuple[list[str], dict[str, str], dict[str, Any]]] = {
    "v_pred": (["v_pred"], {}, {"prediction_type": "v_prediction"}),
    "v_pred, ztsnr": (["v_pred", "ztsnr"], {}, TRAILING),
    "ztsnr": (["ztsnr"], {}, TRAILING),
    "modelspec": ([], {"modelspec.prediction_type": "v"}, {"prediction_type": "v_prediction"}),
    "comfy's note": ([], {"modelspec.predict_key": "v"}, {"prediction_type": "v_prediction"}),
    "note, ztsnr": (["ztsnr"], {"modelspec.prediction_type": "V_prediction"}, TRAILING),
    "sd-scripts": ([], {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, TRAILING),
    "epsilon": ([], {"modelspec.prediction_type": "epsilon"}, {"prediction_type": "epsilon"}),
    "a stale note": (["v_pred"], {"modelspec.prediction_type": "epsilon"}, {"prediction_type": "v_prediction"}),
    "architecture": ([], {"modelspec.architecture": "stable-diffusion-v2-768-v"}, {"prediction_type": "v_prediction"}),
}


def scheduler_config_after(model: Path, names: list[str], notes: dict[str, str], view: Path) -> dict[str, Any]:
    """The scheduler's configuration after a file with such names and metadata, over the texts of `model`."""
    files = tuple(path.relative_to(model).as_posix() for path in model.rglob("*.json"))
    Checkpoint(model, files, Layout("", {}, ()), Source()).link_into(view)
    before = json.loads((view / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    sampling = sampling_of(dict.fromkeys(names, TensorInfo("F32", (0,))), notes, dict.fromkeys(names, torch.empty(0)))
    apply(sampling, view, before)
    found: dict[str, Any] = json.loads((view / "scheduler" / "scheduler_config.json").read_text())
    return found


@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("template", ["sd1", "sd2", "sdxl"])
def test_prediction_type_of_the_file_is_set_in_the_scheduler(template: str, said: str, tiny_model: Get, tmp_path: Path) -> None:
    names, notes, expected = SAID[said]
    model = tiny_model(template)
    own = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    found = scheduler_config_after(model, names, notes, tmp_path / "view")
    assert {key: found[key] for key in expected} == expected
    kept = ("beta_start", "beta_end", "beta_schedule")
    assert {key: found[key] for key in kept} == {key: own[key] for key in kept}
    if expected is TRAILING and template == "sd1":
        assert found["_class_name"] == "DDIMScheduler", "PNDM knows nothing of zero terminal SNR"
        assert found["clip_sample"] is False
    else:
        assert found["_class_name"] == own["_class_name"]


def test_v_prediction_markers_configure_the_scheduler(stored: Weights, tiny_model: Get, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in tiny_model("sd1").rglob("*.json")}
    markers = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    view = convert({**stored, **markers}, tiny_model("sd1"), tmp_path)
    assert {key: scheduler_of(view)[key] for key in TRAILING} == TRAILING
    assert {path: path.read_bytes() for path in tiny_model("sd1").rglob("*.json")} == before, "the template stays as it was"
    pipe = AutoPipelineForImage2Image.from_pretrained(view, use_safetensors=True, local_files_only=True)
    assert {key: pipe.scheduler.config[key] for key in TRAILING} == TRAILING
    assert float(pipe.scheduler.alphas_cumprod[-1]) < 1e-6


def test_edm_models_get_their_schedulers_and_latent_statistics(stored: Weights, tiny_model: Get, tmp_path: Path) -> None:
    mean, std = torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([1.0, 2.0, 0.5, 1.5])
    view = convert({**stored, "edm_mean": mean.reshape(1, 4, 1, 1), "edm_std": std}, tiny_model("sd1"), tmp_path)
    vae = json.loads((view / "vae" / "config.json").read_text())
    assert scheduler_of(view)["_class_name"] == "EDMDPMSolverMultistepScheduler"
    assert vae["latents_mean"] == pytest.approx(mean.tolist())
    assert vae["latents_std"] == pytest.approx(std.tolist())
    assert vae["scaling_factor"] == 0.5
    (tmp_path / "cos").mkdir()
    cos = {"edm_vpred.sigma_max": torch.tensor(90.0), "edm_vpred.sigma_min": torch.tensor(0.01)}
    found = scheduler_of(convert({**stored, **cos}, tiny_model("sd1"), tmp_path / "cos"))
    expected = {"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction", "sigma_max": 90.0, "sigma_data": 1.0}
    assert {key: found[key] for key in expected} == expected


def renamed(weights: Weights, old: str, new: str) -> Weights:
    found = {name.replace(old, new, 1) if name.startswith(old) else name: value for name, value in weights.items()}
    assert found.keys() != weights.keys()
    return found


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."),
        (UNET, "diffusion_model."),
        (UNET, ""),
        ("first_stage_model.", "vae."),
    ],
)
def test_alternative_tensor_names_are_accepted(old: str, new: str, stored: Weights, tiny_model: Get, tmp_path: Path) -> None:
    view = convert(renamed(stored, old, new), tiny_model("sd1"), tmp_path, name="MODEL.SAFETENSORS")
    assert_equal(weights_of(view), weights_of(tiny_model("sd1")))


def test_a_bare_unet_in_scaled_float8_is_scaled(stored: Weights, tiny_model: Get, tmp_path: Path) -> None:
    name = "time_embed.0.weight"
    bare = renamed(stored, UNET, "")
    bare[name] = bare[name].to(torch.float8_e4m3fn)
    bare["time_embed.0.scale_weight"] = torch.tensor(3.0)
    found = weights_of(convert(bare, tiny_model("sd1"), tmp_path))["unet"]["time_embedding.linear_1.weight"]
    assert torch.equal(found, bare[name].float() * 3)
