"""Makes diffusers pipelines of real size with random weights, which take the time and memory of real models.

Heavy imports are inside the functions, so that `scripts/bench --help` is quick.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

_MODELS_FOLDER = Path(".bench/models")


def saved_model(name: str, precision: str) -> Path:
    """The folder of a model, made once with fixed random numbers."""
    directory = _MODELS_FOLDER / f"{name}-{precision}"
    if not (directory / "model_index.json").is_file():
        import torch

        print(f"making {directory}", flush=True)
        torch.manual_seed(0)
        with torch.no_grad():
            pipeline = MODELS[name]()
            pipeline.to({"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision])
            pipeline.save_pretrained(directory, safe_serialization=True)
    return directory


UNETS: dict[str, dict[str, Any]] = {
    "sd15": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""The settings of UNets of real size: 860 M parameters of Stable Diffusion 1.5, 2.6 G of SDXL."""
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TOKENIZER = Path(__file__).parents[1] / "demo" / "model" / "tokenizer"


def vae_settings(scaling_factor: float, channels: tuple[int, ...]) -> dict[str, Any]:
    """The settings of an AutoencoderKL with a scale factor of 8; Stable Diffusion has (128, 256, 512, 512) channels."""
    return {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 512,
        "scaling_factor": scaling_factor,
        "force_upcast": False,
    }


def text_config(width: int, layers: int, heads: int, activation: str) -> Any:
    """The configuration of a CLIP text encoder with the demo's tokenizer."""
    from transformers import CLIPTextConfig, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=activation,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _sd15() -> Any:
    """Stable Diffusion 1.5 in real size: 860 M parameters of UNet, 123 M of text encoder, 84 M of VAE."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**UNETS["sd15"])
    return _stable_diffusion(unet, _vae(0.18215, (128, 256, 512, 512)), text_config(768, 12, 12, "quick_gelu"))


def _stable_diffusion(unet: Any, vae: Any, text: Any) -> Any:
    """A pipeline of Stable Diffusion 1 of a UNet, a VAE and a text encoder's configuration."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER),
        unet=unet.eval(),
        scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl_unet() -> Any:
    """SDXL's UNet, 2.6 G parameters, with text encoders of its widths but two layers, and a small VAE.

    Small images are compared after an export, so it says that it is of small ones: its weights are those of any size.
    """
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    with _default(torch.float16):  # otherwise it would take 10 GB before it is saved in fp16
        unet = UNet2DConditionModel(**UNETS["sdxl"] | {"sample_size": 16})
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    return StableDiffusionXLPipeline(
        vae=_vae(0.13025, (32, 64, 64, 64)),
        text_encoder=CLIPTextModel(text_config(768, 2, 12, "quick_gelu")).eval(),
        text_encoder_2=CLIPTextModelWithProjection(text_config(1280, 2, 20, "gelu")).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
    )


def _klein() -> Any:
    """FLUX.2 klein's kind with 95 M parameters of transformer, a text encoder that is larger (230 M), as klein's own, and a small
    VAE."""
    return _klein_of(768, 12, 5, 8)


def _sd3_large() -> Any:
    """Stable Diffusion 3's kind with 294 M parameters of transformer, without T5, for small images."""
    shape = {"num_layers": 8, "attention_head_dim": 64, "num_attention_heads": 16, "caption_projection_dim": 1024}
    return _with_transformer("sd3-no-t5", shape)


def _klein_of(width: int, heads: int, singles: int, transformer_heads: int) -> Any:
    """FLUX.2 klein with a text encoder of so many features and heads, and a transformer of one double and some single blocks.
    Weights are scaled as those of the tests' tiny model, so that images depend on the text and have colors."""
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from tiny_edits import klein

    text = {"hidden_size": width, "intermediate_size": 4 * width, "head_dim": 64}
    text |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    shape = {"num_layers": 1, "num_single_layers": singles, "attention_head_dim": 128, "num_attention_heads": transformer_heads}
    return klein(_MODELS_FOLDER / "tokenizer", text, {**shape, "axes_dims_rope": (32, 32, 32, 32)})


def _small_klein() -> Any:
    """FLUX.2 klein's kind with a transformer of one double and four single blocks of 128 features: one that a busy CPU takes
    through a benchmark of servers."""
    return _klein_of(64, 1, 4, 1)


def _small_sd3() -> Any:
    """Stable Diffusion 3's kind with T5 and a transformer of four blocks of 128 features."""
    shape = {"num_layers": 4, "attention_head_dim": 64, "num_attention_heads": 2, "caption_projection_dim": 128}
    return _with_transformer("sd3", {**shape, "pos_embed_max_size": 32})


def _medium_sd3() -> Any:
    """Stable Diffusion 3's kind with 93 M parameters of transformer, with T5, for small images."""
    shape = {"num_layers": 8, "attention_head_dim": 64, "num_attention_heads": 9, "caption_projection_dim": 576}
    return _with_transformer("sd3", {**shape, "pos_embed_max_size": 32})


def _small_flux() -> Any:
    """Flux dev's kind with a transformer of two double and four single blocks of 128 features."""
    shape = {"num_layers": 2, "num_single_layers": 4, "attention_head_dim": 64, "num_attention_heads": 2}
    return _with_transformer("flux-dev", {**shape, "axes_dims_rope": (16, 24, 24)})


def _with_transformer(name: str, shape: dict[str, Any]) -> Any:
    """The tests' tiny model of that name with a transformer of another shape."""
    import json
    import sys
    import tempfile

    from diffusers import DiffusionPipeline

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import tiny_models

    with tempfile.TemporaryDirectory() as folder:
        directory = tiny_models.build(name, Path(folder) / name)
        entries = json.loads((directory / "model_index.json").read_text())
        left_out = {part: None for part, entry in entries.items() if entry == [None, None]}
        pipeline = DiffusionPipeline.from_pretrained(directory, **left_out)
    kind = type(pipeline.transformer)
    pipeline.transformer = kind.from_config({**pipeline.transformer.config, **shape}).eval()
    return pipeline


def _tiny() -> Any:
    """Stable Diffusion with tiny parts, to test this benchmark."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return _stable_diffusion(unet, _vae(0.18215, (32, 32, 32, 32)), text_config(32, 2, 4, "quick_gelu"))


MODELS: dict[str, Callable[[], Any]] = {
    "sd15": _sd15,
    "sdxl-unet": _sdxl_unet,
    "klein": _klein,
    "sd3-large": _sd3_large,
    "small-klein": _small_klein,
    "small-sd3": _small_sd3,
    "medium-sd3": _medium_sd3,
    "small-flux": _small_flux,
    "tiny": _tiny,
}
"""Makes a diffusers pipeline with random weights in float32, by name, on torch's default device."""


def _default(dtype: Any) -> Any:
    """Sets the type of new parameters within the block."""
    import contextlib

    import torch

    @contextlib.contextmanager
    def changed() -> Any:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    return changed()


def _vae(scaling_factor: float, channels: tuple[int, ...]) -> Any:
    """Scales its colors to those of an image: random weights alone give gray images, which cannot be compared."""
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(**vae_settings(scaling_factor, channels)).eval()
    latents = torch.randn(1, 4, 16, 16) / scaling_factor
    vae.decoder.conv_out.weight.mul_(0.4 / vae.decode(latents).sample.std())
    pixels = torch.rand(1, 3, 128, 128) * 2 - 1
    vae.quant_conv.weight[:4].div_(vae.encode(pixels).latent_dist.mean.std() * scaling_factor)
    vae.quant_conv.bias[4:].sub_(6)
    return vae
