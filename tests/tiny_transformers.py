"""Tiny models whose denoiser is a transformer: Stable Diffusion 3, Flux, Z-Image and Qwen-Image, with random weights."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny_parts import SAMPLE_SIZE, TEXT_WIDTH, qwen_tokenizer, save_tokenizer, t5_encoder, t5_tokenizer, text_config, vae
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
)

CHANNELS = 16
"""The channels of the latents."""


def stable_diffusion_3(directory: Path) -> None:
    """Like SD 3: two CLIPs and a T5."""
    tokenizer_3 = t5_tokenizer(length=77)
    _save_stable_diffusion_3(directory, t5_encoder(tokenizer_3, 2 * TEXT_WIDTH), tokenizer_3)


def stable_diffusion_3_without_t5(directory: Path) -> None:
    """Like SD 3 as many keep it: the T5, half of its size, left out."""
    _save_stable_diffusion_3(directory, None, None)


def _save_stable_diffusion_3(directory: Path, text_encoder_3: Any, tokenizer_3: Any) -> None:
    tokenizer = save_tokenizer(directory / "tokenizer")
    tokenizer_2 = save_tokenizer(directory / "tokenizer_2", pad_token="!")
    transformer = SD3Transformer2DModel(
        sample_size=SAMPLE_SIZE,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=2 * TEXT_WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=16,
    ).eval()
    sample, text = torch.randn(2, CHANNELS, SAMPLE_SIZE, SAMPLE_SIZE), torch.randn(2, 77, 2 * TEXT_WIDTH)
    prediction = transformer(sample, text, torch.randn(2, 2 * TEXT_WIDTH), torch.tensor([500.0, 500.0])).sample
    calibrate(transformer.proj_out, prediction)
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(1.5305, channels=CHANNELS, shift_factor=0.0609),
        text_encoder=CLIPTextModelWithProjection(text_config(tokenizer)).eval(),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer_2, "gelu")).eval(),
        tokenizer_2=tokenizer_2,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    ).save_pretrained(directory, safe_serialization=True)


def flux_schnell(directory: Path) -> None:
    """Like Flux schnell: no guidance at all."""
    _save_flux(directory, guidance=False, scheduler=FlowMatchEulerDiscreteScheduler())


def flux_dev(directory: Path) -> None:
    """Like Flux dev: guidance goes into the transformer, and the schedule depends on the image's size."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    _save_flux(directory, guidance=True, scheduler=scheduler)


def flux_fill(directory: Path) -> None:
    """Like Flux Fill: the transformer also takes the mask's pixels and the latents of the masked source."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    more = 4 * CHANNELS + 4 * 8 * 8
    _save_flux(directory, guidance=True, scheduler=scheduler, more_channels=more, pipeline_class=FluxFillPipeline)


def flux_control(directory: Path) -> None:
    """Like Flux Depth and Canny: the transformer also takes the latents of a control image."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    _save_flux(directory, guidance=True, scheduler=scheduler, more_channels=4 * CHANNELS, pipeline_class=FluxControlPipeline)


def _save_flux(
    directory: Path, guidance: bool, scheduler: Any, more_channels: int = 0, pipeline_class: Any = FluxPipeline
) -> None:
    tokenizer, tokenizer_2 = save_tokenizer(directory / "tokenizer"), t5_tokenizer(length=64)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * CHANNELS + more_channels,
        out_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    strengthen(transformer, 8, "add_v_proj", "attn.to_out.0", "text_embedder.linear_2", "guidance_embedder.linear_2")
    count = (SAMPLE_SIZE // 2) ** 2
    prediction = transformer(
        hidden_states=torch.randn(2, count, 4 * CHANNELS + more_channels),
        encoder_hidden_states=torch.randn(2, 64, TEXT_WIDTH),
        pooled_projections=torch.randn(2, TEXT_WIDTH),
        timestep=torch.full((2,), 0.5),
        img_ids=torch.zeros(count, 3),
        txt_ids=torch.zeros(64, 3),
        guidance=torch.full((2,), 3.5) if guidance else None,
    ).sample
    calibrate(transformer.proj_out, prediction)
    pipeline_class(
        scheduler=scheduler,
        vae=vae(0.3611, channels=CHANNELS, shift_factor=0.1159),
        # Three layers: with two, its random weights are such that kept features change images by 1/255 at most.
        text_encoder=CLIPTextModel(text_config(tokenizer, layers=3)).eval(),
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder(tokenizer_2, TEXT_WIDTH),
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    ).save_pretrained(directory, safe_serialization=True)


def chroma(directory: Path) -> None:
    """Like Chroma: Flux without CLIP and guidance, whose text has a mask, and a small network that makes all modulations."""
    tokenizer = t5_tokenizer(length=64)
    transformer = ChromaTransformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=64,  # of fewer, ONNX Runtime's sines would differ by the number of rows
        approximator_hidden_dim=32,
        approximator_layers=1,
    ).eval()
    strengthen(transformer, 8, "add_v_proj", "attn.to_out.0", "context_embedder")
    count = (SAMPLE_SIZE // 2) ** 2
    prediction = transformer(
        hidden_states=torch.randn(2, count, 4 * CHANNELS),
        encoder_hidden_states=torch.randn(2, 64, TEXT_WIDTH),
        timestep=torch.full((2,), 0.5),
        img_ids=torch.zeros(count, 3),
        txt_ids=torch.zeros(64, 3),
        attention_mask=torch.ones(2, 64 + count),
    ).sample
    calibrate(transformer.proj_out, prediction)
    ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(0.3611, channels=CHANNELS, shift_factor=0.1159),
        text_encoder=t5_encoder(tokenizer, TEXT_WIDTH),
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(directory, safe_serialization=True)


def sana_sprint(directory: Path) -> None:
    """Like SANA-Sprint: a Gemma 2 text encoder, linear attention, and latents of 32 pixels a side."""
    tokenizer = _gemma_tokenizer(directory / "tokenizer")
    text_encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
        )
    ).eval()
    autoencoder = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8,) * 6,
        decoder_block_out_channels=(8,) * 6,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
    ).eval()
    latents = torch.randn(2, 4, SAMPLE_SIZE, SAMPLE_SIZE)
    autoencoder.decoder.conv_out.weight.mul_(0.5 / autoencoder.decode(latents).sample.std())
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=TEXT_WIDTH,
        sample_size=32,
        qk_norm="rms_norm_across_heads",
        guidance_embeds=True,
    ).eval()
    strengthen(transformer, 8, "attn2.to_out.0")
    prediction = transformer(
        hidden_states=torch.randn(2, 4, SAMPLE_SIZE, SAMPLE_SIZE),
        encoder_hidden_states=torch.randn(2, 64, TEXT_WIDTH),
        timestep=torch.full((2,), 0.5),
        guidance=torch.full((2,), 0.45),
    ).sample
    calibrate(transformer.proj_out, prediction)
    SanaSprintPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=autoencoder,
        transformer=transformer,
        scheduler=SCMScheduler(),
    ).save_pretrained(directory, safe_serialization=True)


def _gemma_tokenizer(directory: Path) -> GemmaTokenizerFast:
    """T5's letters and words as a Gemma tokenizer, which pads on the right here as the pipeline asks."""
    directory.mkdir(parents=True)
    backend = t5_tokenizer(length=300).backend_tokenizer
    return GemmaTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="</s>", model_max_length=300
    )


def z_image(directory: Path) -> None:
    """Like Z-Image: a Qwen 3 text encoder, and lists of tensors, each of its own length, into the transformer."""
    tokenizer = qwen_tokenizer(directory / "tokenizer")
    text_encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=512,
        )
    ).eval()
    transformer = ZImageTransformer2DModel(
        in_channels=CHANNELS,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 64, 64],
    ).eval()
    transformer.x_pad_token.normal_()
    transformer.cap_pad_token.normal_()
    sample, text = torch.randn(CHANNELS, 1, SAMPLE_SIZE, SAMPLE_SIZE), torch.randn(40, TEXT_WIDTH)
    prediction = transformer([sample], torch.tensor([0.5]), [text], return_dict=False)[0][0]
    calibrate(transformer.all_final_layer["2-1"].linear, prediction)
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(0.3611, channels=CHANNELS, shift_factor=0.1159),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(directory, safe_serialization=True)
    # As the real one keeps its chat template: not in a file of its own.
    tokenizer.save_pretrained(directory / "tokenizer", save_jinja_files=False)
    (directory / "tokenizer" / "chat_template.jinja").unlink()


def qwen_image(directory: Path) -> None:
    """Like Qwen-Image: a vision-language model as text encoder, and a video's VAE for a single frame."""
    tokenizer = qwen_tokenizer(directory / "tokenizer")
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * CHANNELS,
        out_channels=CHANNELS,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(8, 4, 4),
    ).eval()
    # The prompt is little beside its template: let it matter.
    strengthen(transformer, 16, "add_v_proj", "attn.to_out.0")
    side = SAMPLE_SIZE // 2
    prediction = transformer(
        hidden_states=torch.randn(2, side**2, 4 * CHANNELS),
        encoder_hidden_states=torch.randn(2, 40, TEXT_WIDTH),
        encoder_hidden_states_mask=torch.ones(2, 40, dtype=torch.int64),
        timestep=torch.full((2,), 0.5),
        img_shapes=[[(1, side, side)]] * 2,
    ).sample
    calibrate(transformer.proj_out, prediction)
    QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential"),
        vae=_qwen_vae(),
        text_encoder=qwen_text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(directory, safe_serialization=True)


def qwen_text_encoder(vocabulary: int, **settings: Any) -> Qwen2_5_VLForConditionalGeneration:
    """A vision-language model with tokens of a `vocabulary` of so many; `settings` are those of its configuration."""
    text = {
        "vocab_size": vocabulary,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3], "rope_type": "default"},
        "max_position_embeddings": 2048,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_WIDTH}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **settings)).eval()


def _qwen_vae() -> AutoencoderKLQwenImage:
    vae = AutoencoderKLQwenImage(base_dim=8, z_dim=CHANNELS, dim_mult=[1, 2, 2, 2], num_res_blocks=1).eval()
    image = torch.randn(4, 3, 1, SAMPLE_SIZE * 8, SAMPLE_SIZE * 8).clamp(-1, 1)
    means, deviations = (torch.tensor(vae.config[name]) for name in ("latents_mean", "latents_std"))
    vae.quant_conv.weight[:CHANNELS].mul_(2 / vae.encode(image).latent_dist.mean.std())
    vae.quant_conv.bias[CHANNELS:].sub_(6)
    latents = torch.randn(4, CHANNELS, 1, SAMPLE_SIZE, SAMPLE_SIZE)
    latents = latents * deviations.view(1, -1, 1, 1, 1) + means.view(1, -1, 1, 1, 1)
    vae.decoder.conv_out.weight.mul_(0.5 / vae.decode(latents).sample.std())
    vae.decoder.conv_out.bias.zero_()
    return vae


def strengthen(transformer: torch.nn.Module, factor: float, *endings: str) -> None:
    """Scales up the parts whose names end so, which random weights make too small."""
    for name, module in transformer.named_modules():
        if name.endswith(endings) and isinstance(module, torch.nn.Linear):
            module.weight.mul_(factor)


def calibrate(last: torch.nn.Linear, prediction: torch.Tensor) -> None:
    """Makes the prediction of unit variance."""
    last.weight.div_(prediction.std())
    if last.bias is not None:
        last.bias.zero_()
