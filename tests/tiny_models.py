"""Tiny diffusers models with random weights, built from configurations alone: the same architecture, other sizes.

Each builder saves a directory in the layout of a real checkpoint of its family, in a few seconds and always with the same
weights.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_controlnets
import tiny_edits
import tiny_kandinsky
import tiny_kolors
import tiny_transformers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    IFImg2ImgPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusion3PAGImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPAGImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPAGImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tiny_parts import BETAS, TEXT_WIDTH, make_vae_overflow, save_tokenizer, t5_encoder, t5_tokenizer, text_config, unet, vae
from transformers import CLIPTextModel, CLIPTextModelWithProjection


def build(name: str, directory: Path) -> Path:
    """Saves the tiny model `name`, a key of BUILDERS, into `directory` and returns it."""
    directory.mkdir(parents=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with more, sums come out otherwise, and weights are scaled by sums
    try:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            BUILDERS[name](directory)
    finally:
        torch.set_num_threads(threads)
    return directory


def _stable_diffusion_1(directory: Path) -> None:
    """Like SD 1.5: epsilon, PNDM, the argmax pooling of old CLIP configurations."""
    tokenizer = save_tokenizer(directory / "tokenizer")
    config = text_config(tokenizer)
    config.eos_token_id = 2
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    _save_stable_diffusion(directory, tokenizer, CLIPTextModel(config), unet(), scheduler)


def _stable_diffusion_2(directory: Path) -> None:
    """Like SD 2.1: v-prediction, DDIM, a list of head sizes, linear projections."""
    tokenizer = save_tokenizer(directory / "tokenizer", pad_token="!")
    text_encoder = CLIPTextModel(text_config(tokenizer, "gelu"))
    predictor = unet(attention_head_dim=[2, 4], use_linear_projection=True)
    scheduler = DDIMScheduler(**BETAS, prediction_type="v_prediction", steps_offset=1, clip_sample=False, set_alpha_to_one=False)
    _save_stable_diffusion(directory, tokenizer, text_encoder, predictor, scheduler)


def _latent_consistency(directory: Path) -> None:
    """Like LCM Dreamshaper: guidance goes into the UNet as an embedding."""
    tokenizer = save_tokenizer(directory / "tokenizer")
    text_encoder = CLIPTextModel(text_config(tokenizer))
    predictor = unet(time_cond_proj_dim=TEXT_WIDTH)
    # With random weights it has little effect.
    predictor.time_embedding.cond_proj.weight.mul_(8)
    scheduler = LCMScheduler(**BETAS)
    _save_stable_diffusion(directory, tokenizer, text_encoder, predictor, scheduler, LatentConsistencyModelPipeline)


def _instruct_pix2pix(directory: Path) -> None:
    """Like InstructPix2Pix: the source's latents go into the UNet beside the noise, so it has eight channels."""
    tokenizer = save_tokenizer(directory / "tokenizer")
    text_encoder = CLIPTextModel(text_config(tokenizer))
    scheduler = EulerAncestralDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading")
    pipeline_class = StableDiffusionInstructPix2PixPipeline
    _save_stable_diffusion(directory, tokenizer, text_encoder, unet(in_channels=8), scheduler, pipeline_class)


def _stable_diffusion_tiny_vae(directory: Path) -> None:
    """Stable Diffusion with an AutoencoderTiny (TAESD), as many put it in for speed. Its latents have no distribution."""
    tokenizer = save_tokenizer(directory / "tokenizer")
    autoencoder = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    ).eval()
    autoencoder.decoder.layers[-1].weight.mul_(1.5 / autoencoder.decode(torch.randn(2, 4, 8, 8)).sample.std())
    autoencoder.decoder.layers[-1].bias.zero_()
    noise = torch.randn(2, 3, 64, 64).clamp(-1, 1)
    autoencoder.encoder.layers[-1].weight.div_(autoencoder.encode(noise).latents.std())
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    text_encoder = CLIPTextModel(text_config(tokenizer))
    _save_stable_diffusion(directory, tokenizer, text_encoder, unet(), scheduler, autoencoder=autoencoder)


def _stable_diffusion_masked(directory: Path) -> None:
    """Stable Diffusion whose text encoder reads the prompt's attention mask, and whose UNet pools its states as an embedding."""
    tokenizer = save_tokenizer(directory / "tokenizer")
    config = text_config(tokenizer)
    config.use_attention_mask = True
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    predictor = unet(addition_embed_type="text", addition_embed_type_num_heads=4)
    _save_stable_diffusion(directory, tokenizer, CLIPTextModel(config), predictor, scheduler)


def _stable_diffusion_pag(directory: Path) -> None:
    """Stable Diffusion with perturbed attention guidance: a third row for each image."""
    _stable_diffusion_1(directory)
    _save_as(directory, StableDiffusionPAGImg2ImgPipeline)


def _stable_diffusion_xl_pag(directory: Path) -> None:
    """SDXL with perturbed attention guidance."""
    _stable_diffusion_xl(directory)
    _save_as(directory, StableDiffusionXLPAGImg2ImgPipeline)


def _stable_diffusion_xl_control_pag(directory: Path) -> None:
    """SDXL with a ControlNet of its own and PAG."""
    _stable_diffusion_xl(directory)
    net = ControlNetModel.from_pretrained(tiny_controlnets.build(directory, directory / "controlnet", "a"))
    pipeline = StableDiffusionXLControlNetPAGImg2ImgPipeline.from_pretrained(directory, controlnet=net)
    pipeline.save_pretrained(directory, safe_serialization=True)


def _stable_diffusion_3_pag(directory: Path) -> None:
    """Stable Diffusion 3 with perturbed attention guidance."""
    tiny_transformers.stable_diffusion_3(directory)
    _save_as(directory, StableDiffusion3PAGImg2ImgPipeline)


def _save_as(directory: Path, pipeline_class: Any) -> None:
    """Saves the pipeline in `directory` as one of another class."""
    pipeline_class.from_pretrained(directory).save_pretrained(directory, safe_serialization=True)


def _deepfloyd_if(directory: Path) -> None:
    """Like DeepFloyd IF's first stage: a T5, and a UNet of pixels, which predicts its variance, too. It has no VAE."""
    tokenizer = t5_tokenizer(length=77)
    IFImg2ImgPipeline(
        tokenizer=tokenizer,
        text_encoder=t5_encoder(tokenizer, TEXT_WIDTH),
        unet=unet(
            sample_size=32,
            in_channels=3,
            out_channels=6,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            encoder_hid_dim=TEXT_WIDTH,
            cross_attention_dim=16,
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            resnet_time_scale_shift="scale_shift",
            act_fn="gelu",
        ),
        scheduler=DDPMScheduler(
            beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True, dynamic_thresholding_ratio=0.95,
            sample_max_value=1.5, prediction_type="epsilon",
        ),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    ).save_pretrained(directory, safe_serialization=True)  # fmt: skip


def _save_stable_diffusion(
    directory: Path,
    tokenizer: Any,
    text_encoder: Any,
    predictor: Any,
    scheduler: Any,
    pipeline_class: Any = StableDiffusionPipeline,
    autoencoder: Any = None,
) -> None:
    pipeline_class(
        vae=autoencoder or vae(0.18215),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=predictor,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(directory, safe_serialization=True)


def _unet_xl(text_width: int, time_ids: int, in_channels: int = 4, layers: int = 1) -> UNet2DConditionModel:
    """SDXL's own has several `layers` in a transformer; for its relatives one is enough."""
    return unet(
        in_channels=in_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=[2, 4],
        transformer_layers_per_block=[1, layers],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 8 * time_ids,
    )


def _euler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading")


def _inpainting(directory: Path) -> None:
    """Like SD 1.5's inpainting model: the UNet also takes the mask and the latents of the masked source."""
    tokenizer = save_tokenizer(directory / "tokenizer")
    config = text_config(tokenizer)
    config.eos_token_id = 2
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    encoder = CLIPTextModel(config)
    _save_stable_diffusion(directory, tokenizer, encoder, unet(in_channels=9), scheduler, StableDiffusionInpaintPipeline)


def _stable_diffusion_xl_inpainting(directory: Path) -> None:
    """Like SDXL's inpainting model."""
    _save_stable_diffusion_xl(directory, vae(0.13025, force_upcast=True), StableDiffusionXLInpaintPipeline, in_channels=9)


def _stable_diffusion_xl(directory: Path) -> None:
    """Like SDXL base: two text encoders, Euler, six time ids."""
    _save_stable_diffusion_xl(directory, vae(0.13025, force_upcast=True))


def _stable_diffusion_xl_overflow(directory: Path) -> None:
    """Like SDXL base with its first VAE, which works in fp32 only."""
    _save_stable_diffusion_xl(directory, make_vae_overflow(vae(0.13025, force_upcast=True)))


def _save_stable_diffusion_xl(
    directory: Path, autoencoder: AutoencoderKL, pipeline_class: Any = StableDiffusionXLPipeline, in_channels: int = 4
) -> None:
    tokenizer = save_tokenizer(directory / "tokenizer")
    tokenizer_2 = save_tokenizer(directory / "tokenizer_2", pad_token="!")
    pipeline_class(
        vae=autoencoder,
        text_encoder=CLIPTextModel(text_config(tokenizer)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer_2, "gelu")).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=_unet_xl(2 * TEXT_WIDTH, time_ids=6, in_channels=in_channels, layers=2 if in_channels == 4 else 1),
        scheduler=_euler(),
        force_zeros_for_empty_prompt=True,
    ).save_pretrained(directory, safe_serialization=True)


def _refiner(directory: Path) -> None:
    """Like the SDXL refiner: the second text encoder only, and an aesthetics score among its five time ids."""
    tokenizer_2 = save_tokenizer(directory / "tokenizer_2", pad_token="!")
    StableDiffusionXLImg2ImgPipeline(
        vae=vae(0.13025, force_upcast=True),
        text_encoder=None,
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer_2, "gelu")).eval(),
        tokenizer=None,
        tokenizer_2=tokenizer_2,
        unet=_unet_xl(TEXT_WIDTH, time_ids=5),
        scheduler=_euler(),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    ).save_pretrained(directory, safe_serialization=True)


BUILDERS: dict[str, Callable[[Path], None]] = {
    "sd1": _stable_diffusion_1,
    "sd2": _stable_diffusion_2,
    "sdxl": _stable_diffusion_xl,
    "refiner": _refiner,
    "sdxl-overflow": _stable_diffusion_xl_overflow,
    "sd-inpaint": _inpainting,
    "sdxl-inpaint": _stable_diffusion_xl_inpainting,
    "lcm": _latent_consistency,
    "pix2pix": _instruct_pix2pix,
    "sd3": tiny_transformers.stable_diffusion_3,
    "sd3-no-t5": tiny_transformers.stable_diffusion_3_without_t5,
    "flux": tiny_transformers.flux_schnell,
    "flux-dev": tiny_transformers.flux_dev,
    "flux-fill": tiny_transformers.flux_fill,
    "flux-control": tiny_transformers.flux_control,
    "sd-tiny-vae": _stable_diffusion_tiny_vae,
    "sd-masked": _stable_diffusion_masked,
    "sd-pag": _stable_diffusion_pag,
    "sdxl-pag": _stable_diffusion_xl_pag,
    "sdxl-control-pag": _stable_diffusion_xl_control_pag,
    "sd3-pag": _stable_diffusion_3_pag,
    "if": _deepfloyd_if,
    "kontext": tiny_edits.flux_kontext,
    "flux2": tiny_edits.flux_2,
    "klein": tiny_edits.flux_2_klein,
    "qwenimage-edit": tiny_edits.qwen_image_edit,
    "qwenimage-edit-plus": tiny_edits.qwen_image_edit_plus,
    "qwenimage-layered": tiny_edits.qwen_image_layered,
    "qwenimage2": tiny_edits.qwen_image_2,
    "longcat-edit": tiny_edits.longcat_image_edit,
    "chroma": tiny_transformers.chroma,
    "sana-sprint": tiny_transformers.sana_sprint,
    "kandinsky21": tiny_kandinsky.kandinsky_2_1,
    "kandinsky22": tiny_kandinsky.kandinsky_2_2,
    "kandinsky3": tiny_kandinsky.kandinsky_3,
    "kolors": tiny_kolors.kolors,
    "zimage": tiny_transformers.z_image,
    "qwenimage": tiny_transformers.qwen_image,
}
"""How to build each tiny model, by its name."""
