"""Tiny editing models: the source is an extra condition with its own size, and there is no strength."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from img2img_server.runtime.common.processors import loadable
from tiny_parts import SAMPLE_SIZE, TEXT_WIDTH, qwen_tokenizer, t5_tokenizer, vae
from tiny_transformers import CHANNELS, calibrate, flux_dev, qwen_image, qwen_text_encoder, strengthen
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

_VISION_MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def flux_kontext(directory: Path) -> None:
    """Like Flux Kontext: Flux dev, with the source's tokens after the noise's."""
    flux_dev(directory)
    parts = diffusers.DiffusionPipeline.from_pretrained(directory).components
    diffusers.FluxKontextPipeline(**parts).save_pretrained(directory, safe_serialization=True)


def flux_2_klein(directory: Path) -> None:
    """Like FLUX.2 klein: three layers' states of a Qwen 3 as text, and latents normalized by a batch norm's statistics."""
    text = {"hidden_size": TEXT_WIDTH, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    shape = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    pipeline = klein(directory / "tokenizer", text, {**shape, "axes_dims_rope": (4, 4, 4, 4)})
    pipeline.save_pretrained(directory, safe_serialization=True)


def klein(tokenizer_folder: Path, text: Mapping[str, Any], shape: Mapping[str, Any]) -> diffusers.Flux2KleinPipeline:
    """A FLUX.2 klein whose text encoder and transformer have these settings. Writes its tokenizer's files."""
    tokenizer = qwen_tokenizer(tokenizer_folder)
    text_encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            num_hidden_layers=28,  # the pipeline reads the states of layers 9, 18 and 27
            max_position_embeddings=512,
            **text,
        )
    ).eval()
    autoencoder = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 16, 16, 16),
        decoder_block_out_channels=(8, 16, 16, 16),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=SAMPLE_SIZE * 8,
    ).eval()
    noise = torch.randn(2, 3, SAMPLE_SIZE * 8, SAMPLE_SIZE * 8).clamp(-1, 1)
    autoencoder.quant_conv.weight[:CHANNELS].mul_(4 / autoencoder.encode(noise).latent_dist.mean.std())
    latents = torch.randn(2, CHANNELS, SAMPLE_SIZE, SAMPLE_SIZE)
    autoencoder.decoder.conv_out.weight.mul_(0.5 / autoencoder.decode(latents).sample.std())
    autoencoder.decoder.conv_out.bias.zero_()
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=4 * CHANNELS, joint_attention_dim=3 * text["hidden_size"], guidance_embeds=False, **shape
    ).eval()
    _strengthen_conditioning(transformer)
    side = SAMPLE_SIZE // 2
    prediction = transformer(
        hidden_states=torch.randn(2, side**2, 4 * CHANNELS),
        encoder_hidden_states=torch.randn(2, 64, 3 * text["hidden_size"]),
        timestep=torch.full((2,), 0.5),
        img_ids=torch.zeros(side**2, 4),
        txt_ids=torch.zeros(64, 4),
    ).sample
    calibrate(transformer.proj_out, prediction)
    return diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=True,
    )


def _strengthen_conditioning(transformer: Any) -> None:
    """Makes the text and the source affect the output of a FLUX.2 transformer, not only the noise."""
    strengthen(transformer, 8, "add_v_proj", "attn.to_v", "attn.to_out.0", "context_embedder")


def qwen_image_edit(directory: Path) -> None:
    """Like Qwen-Image-Edit: the text encoder sees the source, and so does the transformer."""
    _save_qwen_edit(directory, diffusers.QwenImageEditPipeline)


def qwen_image_edit_plus(directory: Path) -> None:
    """Like Qwen-Image-Edit-2509: it takes several images, each in two sizes."""
    _save_qwen_edit(directory, diffusers.QwenImageEditPlusPipeline)


def qwen_image_layered(directory: Path) -> None:
    """Like Qwen-Image-Layered: it divides an image into layers."""
    _save_qwen_edit(directory, diffusers.QwenImageLayeredPipeline)


def _save_qwen_edit(directory: Path, kind: Any) -> None:
    qwen_image(directory)
    tokenizer = qwen_tokenizer(directory / "tokenizer", _VISION_MARKS)
    parts = diffusers.DiffusionPipeline.from_pretrained(directory).components
    parts |= {"tokenizer": tokenizer, "text_encoder": _seeing(tokenizer), "processor": _processor(tokenizer)}
    kind(**parts).save_pretrained(directory, safe_serialization=True)


def _seeing(tokenizer: Any) -> Any:
    """A text encoder that sees images of 28 x 28 pixels a token."""
    image, video = (tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("image", "video"))
    return qwen_text_encoder(len(tokenizer), image_token_id=image, video_token_id=video)


def _processor(tokenizer: Any) -> Any:
    return loadable(Qwen2VLProcessor)(Qwen2VLImageProcessor(), tokenizer, chat_template=tokenizer.chat_template)


def longcat_image_edit(directory: Path) -> None:
    """Like LongCat-Image-Edit: Flux' kind of transformer, and a text encoder that sees the source."""
    tokenizer = qwen_tokenizer(directory / "tokenizer", _VISION_MARKS)
    transformer = diffusers.LongCatImageTransformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        axes_dims_rope=[4, 4, 8],
    ).eval()
    strengthen(transformer, 8, "add_v_proj", "attn.to_out.0", "context_embedder")
    side = SAMPLE_SIZE // 2
    prediction = transformer(
        hidden_states=torch.randn(2, side**2, 4 * CHANNELS),
        encoder_hidden_states=torch.randn(2, 64, TEXT_WIDTH),
        timestep=torch.full((2,), 0.5),
        img_ids=torch.zeros(side**2, 3),
        txt_ids=torch.zeros(64, 3),
    ).sample
    calibrate(transformer.proj_out, prediction)
    diffusers.LongCatImageEditPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(0.3611, channels=CHANNELS, shift_factor=0.1159),
        text_encoder=_seeing(tokenizer),
        tokenizer=tokenizer,
        text_processor=_processor(tokenizer),
        transformer=transformer,
    ).save_pretrained(directory, safe_serialization=True)


def flux_2(directory: Path) -> None:
    """Like FLUX.2: klein's parts with guidance as an input, and the states of a Mistral 3 as text.

    The tokenizer is alone; in the real one it is part of a PixtralProcessor, which transformers has only beside torchvision.
    """
    flux_2_klein(directory)
    parts = diffusers.DiffusionPipeline.from_pretrained(directory).components
    tokenizer = _mistral_tokenizer()
    text = {
        "model_type": "mistral",
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 31,  # the pipeline reads the states of layers 10, 20 and 30
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "image_size": 32,
        "patch_size": 8,
    }
    mark = tokenizer.convert_tokens_to_ids("[IMG]")
    text_encoder = Mistral3ForConditionalGeneration(
        Mistral3Config(vision_config=vision, text_config=text, image_token_index=mark, vision_feature_layer=-1)
    )
    transformer = diffusers.Flux2Transformer2DModel.from_config({**parts["transformer"].config, "guidance_embeds": True}).eval()
    _strengthen_conditioning(transformer)
    strengthen(transformer, 8, "guidance_embedder.linear_2")
    parts |= {"tokenizer": tokenizer, "text_encoder": text_encoder.eval(), "transformer": transformer}
    diffusers.Flux2Pipeline(**parts).save_pretrained(directory, safe_serialization=True)


_MISTRAL_CHAT = (
    "{% for message in messages %}{% for item in message.content %}"
    "{{ '[INST]' + item.text if message.role == 'user' else item.text }}{% endfor %}{% endfor %}"
)


def _mistral_tokenizer() -> Any:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=t5_tokenizer(length=512).backend_tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["[IMG]", "[INST]"],
        model_max_length=512,
    )
    tokenizer.chat_template = _MISTRAL_CHAT
    return tokenizer


def qwen_image_2(directory: Path) -> None:
    """Like Qwen-Image 2.1: a Qwen 3 VL that sees the source, and latents of 16 pixels a side that are one token each."""
    tokenizer = qwen_tokenizer(directory / "tokenizer", _VISION_MARKS)
    image, video = (tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("image", "video"))
    start, end = (tokenizer.convert_tokens_to_ids(f"<|vision_{kind}|>") for kind in ("start", "end"))
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_scaling": {"mrope_section": [2, 3, 3], "rope_type": "default", "mrope_interleaved": True},
        "max_position_embeddings": 8192,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": TEXT_WIDTH,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    marks = {"image_token_id": image, "video_token_id": video, "vision_start_token_id": start, "vision_end_token_id": end}
    text_encoder = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **marks)).eval()
    settings = {"base_dim": 8, "decoder_base_dim": 8, "z_dim": CHANNELS, "num_res_blocks": 1}
    means, deviations = [0.0] * CHANNELS, [1.0] * CHANNELS
    autoencoder = diffusers.AutoencoderKLQwenImage21(
        **settings, dim_mult=[1, 1, 2, 2, 2], latents_mean=means, latents_std=deviations
    ).eval()
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=TEXT_WIDTH,
        axes_dims_rope=(8, 4, 4),
    ).eval()
    strengthen(transformer, 8, "txt_in.out_layer", "attn.to_out.0")
    processor = loadable(Qwen3VLProcessor)(
        Qwen2VLImageProcessor(patch_size=16, min_pixels=2**16, max_pixels=2**24), tokenizer, chat_template=_QWEN_CHAT
    )
    diffusers.QwenImage21Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential"),
        vae=autoencoder,
        text_encoder=text_encoder,
        processor=processor,
        transformer=transformer,
    ).save_pretrained(directory, safe_serialization=True)


_QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for item in message.content %}{{ item.text }}{% endfor %}<|im_end|>\n{% endfor %}"
)
