"""Tiny diffusers models with random weights, built from configurations alone: the same architecture, other sizes.

Each builder saves a directory in the layout of a real checkpoint of its family, in a few seconds and always with the same
weights. The weights are rescaled on one pass of noise, so that the latents have unit variance and the pictures have
contrast: on grey pictures a difference of 1/255 would mean nothing.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    KandinskyV22Img2ImgCombinedPipeline,
    PNDMScheduler,
    PriorTransformer,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

TEXT_WIDTH = 32
"""Features of a token, and of a projected text."""
SAMPLE_SIZE = 8
"""Latent height and width that the models call their own: pictures of 64 x 64 pixels."""

_WORDS = ("lake", "mountain", "sunset", "winter", "forest", "the", "a", "with", "and", "at")
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def build(name: str, directory: Path) -> Path:
    """Saves the tiny model `name`, a key of BUILDERS, into `directory` and returns it."""
    directory.mkdir(parents=True)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        BUILDERS[name](directory)
    return directory


def save_tokenizer(directory: Path, pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """A CLIP tokenizer that knows every byte and a few words, made by code and saved into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
    merges: list[tuple[str, str]] = []
    for word in _WORDS:
        left = word[0] if len(word) > 1 else f"{word}</w>"
        for index, letter in enumerate(word[1:], start=2):
            right = letter if index < len(word) else f"{letter}</w>"
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}
    (directory / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"), pad_token=pad_token, model_max_length=77)


def _text_config(tokenizer: CLIPTokenizer, activation: str = "quick_gelu") -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act=activation,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=1,
    )


def _unet(**changes: Any) -> UNet2DConditionModel:
    settings: dict[str, Any] = {
        "sample_size": SAMPLE_SIZE,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (16, 32, 32),
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": 4,
    }
    return _calibrate_unet(UNet2DConditionModel(**{**settings, **changes}).eval())


def _calibrate_unet(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Makes the prompt matter (larger cross-attention) and the prediction of unit variance."""
    for name, module in unet.named_modules():
        if name.endswith("attn2.to_out.0"):
            module.weight.mul_(8)
    sample, text = torch.randn(2, 4, SAMPLE_SIZE, SAMPLE_SIZE), torch.randn(2, 77, unet.config.cross_attention_dim)
    conditions: dict[str, torch.Tensor] = {}
    if unet.config.addition_embed_type == "text_time":
        count = (unet.config.projection_class_embeddings_input_dim - TEXT_WIDTH) // unet.config.addition_time_embed_dim
        conditions = {"text_embeds": torch.randn(2, TEXT_WIDTH), "time_ids": torch.full((2, count), 64.0)}
    prediction = unet(sample, 500, text, added_cond_kwargs=conditions).sample
    unet.conv_out.weight.div_(prediction.std())
    unet.conv_out.bias.zero_()
    return unet


def _vae(scaling_factor: float, force_upcast: bool = False) -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SAMPLE_SIZE * 8,
        scaling_factor=scaling_factor,
        force_upcast=force_upcast,
    ).eval()
    picture = torch.randn(4, 3, SAMPLE_SIZE * 8, SAMPLE_SIZE * 8).clamp(-1, 1)
    vae.quant_conv.weight[:4].div_(vae.encode(picture).latent_dist.mean.std() * scaling_factor)
    vae.quant_conv.bias[4:].sub_(6)
    latents = torch.randn(4, 4, SAMPLE_SIZE, SAMPLE_SIZE) / scaling_factor
    vae.decoder.conv_out.weight.mul_(0.5 / vae.decode(latents).sample.std())
    vae.decoder.conv_out.bias.zero_()
    return vae


def _stable_diffusion_1(directory: Path) -> None:
    """Like SD 1.5: epsilon, PNDM, the argmax pooling of old CLIP configurations."""
    tokenizer = save_tokenizer(directory / "tokenizer")
    config = _text_config(tokenizer)
    config.eos_token_id = 2
    scheduler = PNDMScheduler(**_BETAS, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    _save_stable_diffusion(directory, tokenizer, CLIPTextModel(config), _unet(), scheduler)


def _stable_diffusion_2(directory: Path) -> None:
    """Like SD 2.1: v-prediction, DDIM, a list of head sizes, linear projections."""
    tokenizer = save_tokenizer(directory / "tokenizer", pad_token="!")
    text_encoder = CLIPTextModel(_text_config(tokenizer, "gelu"))
    unet = _unet(attention_head_dim=[2, 4, 4], use_linear_projection=True)
    scheduler = DDIMScheduler(**_BETAS, prediction_type="v_prediction", steps_offset=1, clip_sample=False, set_alpha_to_one=False)
    _save_stable_diffusion(directory, tokenizer, text_encoder, unet, scheduler)


def _save_stable_diffusion(directory: Path, tokenizer: Any, text_encoder: Any, unet: Any, scheduler: Any) -> None:
    StableDiffusionPipeline(
        vae=_vae(0.18215),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(directory, safe_serialization=True)


def _unet_xl(text_width: int, time_ids: int) -> UNet2DConditionModel:
    return _unet(
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=[2, 4],
        transformer_layers_per_block=[1, 2],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 8 * time_ids,
    )


def _euler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(**_BETAS, steps_offset=1, timestep_spacing="leading")


def _stable_diffusion_xl(directory: Path) -> None:
    """Like SDXL base: two text encoders, Euler, six time ids."""
    tokenizer = save_tokenizer(directory / "tokenizer")
    tokenizer_2 = save_tokenizer(directory / "tokenizer_2", pad_token="!")
    StableDiffusionXLPipeline(
        vae=_vae(0.13025, force_upcast=True),
        text_encoder=CLIPTextModel(_text_config(tokenizer)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer_2, "gelu")).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=_unet_xl(2 * TEXT_WIDTH, time_ids=6),
        scheduler=_euler(),
        force_zeros_for_empty_prompt=True,
    ).save_pretrained(directory, safe_serialization=True)


def _refiner(directory: Path) -> None:
    """Like the SDXL refiner: the second text encoder only, and an aesthetics score among its five time ids."""
    tokenizer_2 = save_tokenizer(directory / "tokenizer_2", pad_token="!")
    StableDiffusionXLImg2ImgPipeline(
        vae=_vae(0.13025, force_upcast=True),
        text_encoder=None,
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer_2, "gelu")).eval(),
        tokenizer=None,
        tokenizer_2=tokenizer_2,
        unet=_unet_xl(TEXT_WIDTH, time_ids=5),
        scheduler=_euler(),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    ).save_pretrained(directory, safe_serialization=True)


def _kandinsky_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SAMPLE_SIZE,
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        encoder_hid_dim=TEXT_WIDTH,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
        class_embed_type=None,
    ).eval()


def _kandinsky_movq() -> VQModel:
    movq = VQModel(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        num_vq_embeddings=12,
        vq_embed_dim=4,
        norm_num_groups=4,
        norm_type="spatial",
    ).eval()
    latents = torch.randn(4, 4, SAMPLE_SIZE, SAMPLE_SIZE)
    picture = movq.decode(latents, force_not_quantize=True).sample
    movq.decoder.conv_out.weight.mul_(0.5 / picture.std())
    movq.decoder.conv_out.bias.zero_()
    return movq


def _kandinsky_2_2(directory: Path) -> None:
    """Like Kandinsky 2.2, prior and decoder in one directory: a pipeline that optimum cannot export."""
    tokenizer = save_tokenizer(directory / "prior_tokenizer")
    vision = CLIPVisionConfig(
        hidden_size=32,
        image_size=32,
        projection_dim=TEXT_WIDTH,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        patch_size=8,
    )
    prior = PriorTransformer(num_attention_heads=2, attention_head_dim=16, embedding_dim=TEXT_WIDTH, num_layers=1)
    prior.clip_std.fill_(1.0)
    KandinskyV22Img2ImgCombinedPipeline(
        unet=_kandinsky_unet(),
        scheduler=DDPMScheduler(**_BETAS, clip_sample=False, thresholding=False),
        movq=_kandinsky_movq(),
        prior_prior=prior.eval(),
        prior_image_encoder=CLIPVisionModelWithProjection(vision).eval(),
        prior_text_encoder=CLIPTextModelWithProjection(_text_config(tokenizer)).eval(),
        prior_tokenizer=tokenizer,
        prior_scheduler=UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample=True),
        prior_image_processor=CLIPImageProcessor(size=32, crop_size=32),
    ).save_pretrained(directory, safe_serialization=True)


BUILDERS: dict[str, Callable[[Path], None]] = {
    "sd1": _stable_diffusion_1,
    "sd2": _stable_diffusion_2,
    "sdxl": _stable_diffusion_xl,
    "refiner": _refiner,
    "kandinsky22": _kandinsky_2_2,
}
"""How to build each tiny model, by its name."""
