"""Files and directories that are not servable models: the error names the problem and the solution."""

import codecs
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from img2img_export.errors import ExportError
from img2img_export.options import ExportOptions
from img2img_export.progress import Progress
from img2img_export.read.source import Checkpoint, resolve
from safetensors.torch import load_file, save_file

Get = Callable[[str], Path]


pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.fixture
def model(tiny_model: Get, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("sd1"), tmp_path / "model"))


def find(source: Path, **options: Any) -> Checkpoint:
    return resolve(ExportOptions(source=str(source), output=Path("unused"), **options), Progress())


def refused(source: Path, *words: str, **options: Any) -> str:
    with pytest.raises(ExportError) as caught:
        find(source, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert not [word for word in words if word not in text], text
    return text


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3438167540\n"
FILES: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "a pointer": ("m.safetensors", POINTER, ("git-lfs pointer", "git lfs pull")),
    "GGUF": ("m.safetensors", b"GGUF\x03\0\0\0" + bytes(64), ("GGUF", "safetensors model")),
    "GGUF by name": ("m.gguf", b"GGUF\x03\0\0\0" + bytes(64), ("GGUF", "safetensors model")),
    "a zip": ("m.safetensors", b"PK\x03\x04 archive/data.pkl", ("pickle", "docs/export.md")),
    "a page": ("m.safetensors", b"<!DOCTYPE html><html>", ("web page", "download it again")),
    "nothing": ("m.safetensors", b"", ("empty", "download or copy it again")),
    "cut in its header": ("m.safetensors", (900).to_bytes(8, "little") + b'{"a"', ("truncated", "12 of at least 908")),
    "ckpt": ("m.ckpt", b"x", ("pickle", "convert it", "docs/export.md")),
    "pt": ("m.PT", b"x", ("pickle", "convert it")),
    "bin": ("m.bin", b"x", ("pickle", "convert it")),
}


@pytest.mark.parametrize("kind", FILES)
def test_other_file_types_are_refused_by_kind(kind: str, tmp_path: Path) -> None:
    name, content, words = FILES[kind]
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, str(tmp_path / name), *words)


VAE = ("first_stage_model.encoder.conv_in.weight", "first_stage_model.decoder.conv_in.weight")
TEXTS = ("cond_stage_model.transformer.text_model.final_layer_norm.weight",)
UNET = ("model.diffusion_model.input_blocks.1.0.in_layers.0.weight",)
PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "LoRA of kohya": (("lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight", "lora_te_x.alpha"), ("a LoRA", "--lora")),
    "LoRA of peft": (("unet.down_blocks.0.to_q.lora_A.weight", "unet.down_blocks.0.to_q.lora_B.weight"), ("a LoRA", "--lora")),
    "LoRA of diffusers": (("unet.x.processor.to_q_lora.down.weight", "unet.x.lora.up.weight"), ("a LoRA",)),
    "LoRA of Flux": (("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",), ("a LoRA",)),
    "LoHa": (("lora_unet_x.hada_w1_a", "lora_unet_x.hada_w1_b"), ("a LoRA",)),
    "ControlNet": (("control_model.time_embed.0.weight", "control_model.input_hint_block.0.weight"), ("a ControlNet",)),
    "ControlNet of diffusers": (
        ("controlnet_cond_embedding.conv_in.weight", "controlnet_down_blocks.0.weight"),
        ("a ControlNet",),
    ),
    "IP-Adapter": (("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"), ("an IP-Adapter",)),
    "T2I-Adapter": (("adapter.body.0.block1.weight", "adapter.body.0.in_conv.weight"), ("a T2I-Adapter",)),
    "ESRGAN": (("model.1.sub.0.RDB1.conv1.0.weight", "model.0.weight"), ("an upscaler",)),
    "Real-ESRGAN": (("conv_first.weight", "body.0.rdb1.conv1.weight"), ("an upscaler",)),
    "motion module": (("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight",), ("motion module",)),
    "embedding": (("emb_params",), ("embedding", "not a model")),
    "embedding of SDXL": (("clip_l", "clip_g"), ("embedding", "not a model")),
    "VAE": (("encoder.conv_in.weight", "decoder.up.0.block.0.conv1.weight"), ("a VAE only", "lacks text encoders")),
    "VAE with its prefix": (VAE, ("a VAE only", "lacks text encoders")),
    "TAESD": (("encoder.layers.0.weight", "decoder.layers.1.conv.0.weight"), ("a VAE only",)),
    "UNet": (UNET, ("a denoiser", "lacks a VAE and text encoders")),
    "UNet of diffusers": (("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"), ("a denoiser", "lacks a VAE")),
    "Flux": (("double_blocks.0.img_attn.norm.key_norm.scale", "single_blocks.0.linear1.weight"), ("a denoiser",)),
    "SD3 without texts": ((*VAE, "model.diffusion_model.joint_blocks.0.x"), ("lacks text encoders",)),
    "CLIP": (("text_model.encoder.layers.0.mlp.fc1.weight", "text_model.final_layer_norm.weight"), ("text encoders only",)),
    "T5": (("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"), ("text encoders only",)),
    "something else": (("net.0.weight", "net.1.weight"), ("not a diffusion model", "net.0.weight")),
}


@pytest.mark.parametrize("kind", PARTS)
def test_incomplete_single_files_are_refused_by_kind(kind: str, tmp_path: Path) -> None:
    names, words = PARTS[kind]
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "m.safetensors")
    refused(tmp_path / "m.safetensors", *words)


@pytest.mark.parametrize(("channels", "word"), [(5, "depth"), (8, "InstructPix2Pix"), (9, "inpainting"), (7, "upscaler")])
def test_unet_with_extra_input_channels_is_refused(channels: int, word: str, model: Path, tmp_path: Path) -> None:
    weights = {name: torch.ones(2, 2) for name in (*VAE, *TEXTS, *UNET)}
    weights["model.diffusion_model.input_blocks.0.0.weight"] = torch.ones(4, channels, 3, 3)
    save_file(weights, tmp_path / "m.safetensors")
    refused(tmp_path / "m.safetensors", word, f"{channels} input channels", config=str(model))
    change(model / "unet" / "config.json", in_channels=channels)
    refused(model, word, f"{channels} input channels")


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_denoiser_and_a_vae_of_two_models_are_refused(model: Path) -> None:
    change(model / "unet" / "config.json", in_channels=16)
    refused(model, "takes 16 channels", "the VAE's latents have 4")


@pytest.mark.parametrize("method", ["bitsandbytes", "gguf", "torchao", "quanto", "gptq", None])
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_quantized_component_is_refused(component: str, method: str | None, model: Path) -> None:
    change(model / component / "config.json", quantization_config={"quant_method": method, "load_in_4bit": True})
    refused(model, f"{component} is quantized with {method or 'an unknown method'}", "fp16, bf16 or fp32")


@pytest.mark.parametrize("component", ["tokenizer", "scheduler", "vae", "text_encoder", "unet"])
def test_a_missing_folder_is_named(component: str, model: Path) -> None:
    shutil.rmtree(model / component)
    refused(model, f"no folder {component}/", "model_index.json lists", f"copy {component}/")


@pytest.mark.parametrize(
    ("file", "word"),
    [
        ("tokenizer/vocab.json", "no vocabulary"),
        ("scheduler/scheduler_config.json", "no folder scheduler/"),
        ("unet/config.json", "weights but no config.json"),
        ("unet/diffusion_pytorch_model.safetensors", "no safetensors weights"),
    ],
)
def test_a_missing_file_is_named(file: str, word: str, model: Path) -> None:
    (model / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)  # which has the vocabulary once more
    (model / file).unlink()
    refused(model, word)


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "tokenizer/merges.txt", "vae/config.json"])
def test_a_pointer_in_a_directory_is_named(file: str, model: Path) -> None:
    (model / file).write_bytes(POINTER)
    refused(model, file, "git-lfs pointer")


def test_damaged_files_of_a_directory_are_named(model: Path) -> None:
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    refused(model, str(weights), "truncated")
    shutil.copy(model / "vae" / "diffusion_pytorch_model.safetensors", weights)
    (model / "scheduler" / "scheduler_config.json").write_text('{"a": ')
    refused(model, "scheduler_config.json is damaged", "JSON")


DIRECTORIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "folders only": (("unet/config.json", "vae/config.json"), ("only unet/, vae/", "copy it")),
    "a transformer": (("transformer/config.json",), ("only transformer/", "copy it")),
    "a component": (("config.json", "diffusion_pytorch_model.safetensors"), ("a component", "complete model")),
    "one below": (("inner/model_index.json", "inner/unet/config.json"), ("inner/ has one",)),
    "a single file": (("m.safetensors",), ("m.safetensors", "choose that file")),
    "a pickle": (("m.ckpt",), ("m.ckpt", "docs/export.md")),
    "GGUF": (("m-Q4.gguf",), ("GGUF",)),
    "nothing": ((), ("is empty",)),
}


@pytest.mark.parametrize("kind", DIRECTORIES)
def test_directory_without_model_index_is_refused_by_kind(kind: str, tmp_path: Path) -> None:
    names, words = DIRECTORIES[kind]
    (tmp_path / "d").mkdir()
    for name in names:
        (tmp_path / "d" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "d" / name).write_text("{}")
    refused(tmp_path / "d", "no model_index.json", *words)


@pytest.mark.parametrize(("mark", "encoding"), [(codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le")])
def test_texts_with_a_byte_order_mark_are_read(mark: bytes, encoding: str, model: Path, tmp_path: Path) -> None:
    from diffusers import AutoPipelineForImage2Image

    texts = [path for path in model.rglob("*") if path.suffix in (".json", ".txt")]
    for path in texts:
        path.write_bytes(mark + path.read_text(encoding="utf-8").encode(encoding))
    find(model).link_into(tmp_path / "view")
    AutoPipelineForImage2Image.from_pretrained(tmp_path / "view", use_safetensors=True, local_files_only=True)
    assert all(path.read_bytes().startswith(mark) for path in texts), "the source stays as it was"


def test_uppercase_file_suffix_is_accepted(model: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    expected = load_file(weights)
    weights.rename(weights.with_suffix(".SAFETENSORS"))
    find(model).link_into(tmp_path / "view")
    found = UNet2DConditionModel.from_pretrained(tmp_path / "view" / "unet", use_safetensors=True, local_files_only=True)
    assert torch.equal(found.conv_in.weight, expected["conv_in.weight"])


@pytest.mark.parametrize(
    ("component", "file"),
    [("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")],
)
def test_weights_that_do_not_match_their_component_class_are_refused(component: str, file: str, model: Path) -> None:
    """diffusers and transformers only warn, and draw with other weights."""
    from img2img_export.convert.models import Loader

    path = model / component / f"{file}.safetensors"
    weights = load_file(path)
    last = sorted(weights)[-1]
    loader = Loader(model, find(model).layout)
    save_file({**weights, "extra.weight": torch.ones(2)}, path, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=rf"{component} holds a tensor that the model does not use \(extra\.weight\)"):
        loader.pipeline()
    save_file({name: value for name, value in weights.items() if name != last}, path, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=f"{component} .*{last}"):
        loader.pipeline()
    harmless = {"logit_scale": torch.ones(()), "text_model.embeddings.position_ids": torch.ones(1, 77)}
    harmless |= {"loss.discriminator.weight": torch.ones(2), "vision_model.x": torch.ones(2)}
    save_file({**weights, **harmless}, path, metadata={"format": "pt"})
    assert loader.pipeline() is not None
