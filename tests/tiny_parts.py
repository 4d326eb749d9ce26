"""The parts that tiny models are made of: tokenizers, text encoders, UNets and VAEs, all with random weights.

The weights are rescaled on one pass of noise, so that the latents have unit variance and the images have contrast: on
grey images a difference of 1/255 would mean nothing.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers import decoders as token_decoders
from transformers import CLIPTextConfig, CLIPTokenizer, Qwen2Tokenizer, T5Config, T5EncoderModel, T5TokenizerFast

TEXT_WIDTH = 32
"""Features of a token, and of a projected text."""
SAMPLE_SIZE = 8
"""Latent height and width that the models call their own: images of 64 x 64 pixels."""
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""The noise schedule of the Stable Diffusion and Kandinsky families."""

_TEMPLATE = "Describe the image by detailing color shape size texture quantity text spatial relationships of objects background"
"""The template that Qwen-Image puts around a prompt. The pipeline drops a fixed number of tokens: those of the template in its
own vocabulary."""
_WORDS = ("lake", "mountain", "sunset", "winter", "forest", "the", "a", "with", "and", "at")


def save_tokenizer(directory: Path, pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """A CLIP tokenizer that knows every byte and a few words, made by code and saved into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    merges = _merges(_WORDS, end="</w>")
    letters = _byte_letters()
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    _save_merges(directory, [*vocabulary, "<|startoftext|>", "<|endoftext|>"], merges)
    return CLIPTokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"), pad_token=pad_token, model_max_length=77)


def qwen_tokenizer(directory: Path, more_marks: Sequence[str] = ()) -> Qwen2Tokenizer:
    """Qwen's byte-level tokenizer with a few words and its chat's marks, made by code out of files in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    # Within a text a word begins with its space.
    merges = _merges([f"Ġ{word}" for word in (*_TEMPLATE.split(), *_WORDS)])
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *more_marks]
    _save_merges(directory, [*_byte_letters(), *("".join(pair) for pair in merges), *marks], merges)
    tokenizer = Qwen2Tokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"), additional_special_tokens=marks[1:])
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def t5_tokenizer(length: int) -> T5TokenizerFast:
    """A T5 tokenizer of ASCII letters and a few words, made by code. `length` is its model_max_length."""
    pieces = [*(f"▁{word}" for word in _WORDS), "▁", *(chr(code) for code in range(ord("!"), ord("~") + 1))]
    known = dict.fromkeys(["<pad>", "</s>", "<unk>", *pieces])
    scores = [(piece, 0.0 if piece.startswith("<") else -1.0 if piece in pieces[: len(_WORDS)] else -9.0) for piece in known]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = token_decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, model_max_length=length)


def _byte_letters() -> list[str]:
    """The printable letters by which byte-level tokenizers know the 256 bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def _merges(words: Sequence[str], end: str = "") -> list[tuple[str, str]]:
    """The pairs that make up `words` letter by letter; a word's last letter ends with `end`."""
    merges: list[tuple[str, str]] = []
    for word in words:
        left = word[0] if len(word) > 1 else f"{word}{end}"
        for index, letter in enumerate(word[1:], start=2):
            right = letter if index < len(word) else f"{letter}{end}"
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
    return merges


def _save_merges(directory: Path, vocabulary: list[str], merges: list[tuple[str, str]]) -> None:
    ids = {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}
    (directory / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def text_config(tokenizer: CLIPTokenizer, activation: str = "quick_gelu", layers: int = 2) -> CLIPTextConfig:
    """The configuration of a CLIP text encoder for `tokenizer`."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act=activation,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=1,
    )


def t5_encoder(tokenizer: T5TokenizerFast, width: int) -> T5EncoderModel:
    """A T5 text encoder with `width` features, whose outputs have about unit variance."""
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval()


def unet(**changes: Any) -> UNet2DConditionModel:
    """A UNet like that of Stable Diffusion 1, but for `changes` of its configuration. It has every kind of block once, since
    tracing takes half of an export."""
    settings: dict[str, Any] = {
        "sample_size": SAMPLE_SIZE,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": 4,
    }
    return _calibrate_unet(UNet2DConditionModel(**{**settings, **changes}).eval())


def _calibrate_unet(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Makes the prompt matter (larger cross-attention) and the prediction of unit variance."""
    for name, module in unet.named_modules():
        if name.endswith("attn2.to_out.0"):
            module.weight.mul_(8)
    config = unet.config
    sample = torch.randn(2, config.in_channels, SAMPLE_SIZE, SAMPLE_SIZE)
    text = torch.randn(2, 77, config.encoder_hid_dim or config.cross_attention_dim)
    conditions: dict[str, torch.Tensor] = {}
    if config.addition_embed_type == "text_time":
        count = (config.projection_class_embeddings_input_dim - TEXT_WIDTH) // config.addition_time_embed_dim
        conditions = {"text_embeds": torch.randn(2, TEXT_WIDTH), "time_ids": torch.full((2, count), 64.0)}
    guidance = torch.randn(2, config.time_cond_proj_dim) if config.time_cond_proj_dim else None
    prediction = unet(sample, 500, text, timestep_cond=guidance, added_cond_kwargs=conditions).sample
    unet.conv_out.weight.div_(prediction.std())
    unet.conv_out.bias.zero_()
    return unet


def vae(scaling_factor: float, force_upcast: bool = False, channels: int = 4, shift_factor: float | None = None) -> AutoencoderKL:
    """A VAE with latents of `channels`. Newer ones, which have a `shift_factor`, have no convolutions about the latents."""
    older = shift_factor is None
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=SAMPLE_SIZE * 8,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        force_upcast=force_upcast,
        use_quant_conv=older,
        use_post_quant_conv=older,
    ).eval()
    image = torch.randn(4, 3, SAMPLE_SIZE * 8, SAMPLE_SIZE * 8).clamp(-1, 1)
    last = vae.quant_conv if older else vae.encoder.conv_out
    last.weight[:channels].div_(vae.encode(image).latent_dist.mean.std() * scaling_factor)
    last.bias[channels:].sub_(6)
    latents = torch.randn(4, channels, SAMPLE_SIZE, SAMPLE_SIZE) / scaling_factor + (shift_factor or 0.0)
    vae.decoder.conv_out.weight.mul_(0.5 / vae.decode(latents).sample.std())
    vae.decoder.conv_out.bias.zero_()
    return vae


def make_vae_overflow(vae: AutoencoderKL) -> AutoencoderKL:
    """Lets activations of the decoder exceed what fp16 can hold, 65504, as those of the original SDXL's do.

    In fp32 it decodes as before: the scaled values are normalized right after. All weights still fit into fp16.
    """
    inner = vae.decoder.mid_block.resnets[0].conv1
    factor = 6e4 / max(inner.weight.abs().max(), inner.bias.abs().max())
    inner.weight.mul_(factor)
    inner.bias.mul_(factor)
    return vae
