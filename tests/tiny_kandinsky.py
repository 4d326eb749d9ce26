"""Tiny Kandinsky 2.1, 2.2 and 3: their prior, decoder and MoVQ with random weights."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    Kandinsky3Pipeline,
    Kandinsky3UNet,
    KandinskyImg2ImgCombinedPipeline,
    KandinskyV22Img2ImgCombinedPipeline,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
from tiny_parts import BETAS, SAMPLE_SIZE, TEXT_WIDTH, save_tokenizer, t5_encoder, t5_tokenizer, text_config
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    XLMRobertaTokenizer,
)


def kandinsky_2_1(directory: Path) -> None:
    """Like Kandinsky 2.1, prior and decoder in one directory: the decoder reads the prompt, too, by another encoder."""
    tokenizer = _roberta_tokenizer(directory / "tokenizer")
    config = MCLIPConfig(
        transformerDimSize=TEXT_WIDTH,
        imageDimSize=TEXT_WIDTH,
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=80,
        pad_token_id=tokenizer.pad_token_id,
    )
    KandinskyImg2ImgCombinedPipeline(
        text_encoder=MultilingualCLIP(config).eval(),
        tokenizer=tokenizer,
        unet=_unet(
            addition_embed_type="text_image",
            encoder_hid_dim_type="text_image_proj",
            addition_embed_type_num_heads=4,
            cross_attention_dim=TEXT_WIDTH,
        ),
        scheduler=DDIMScheduler(
            **{**BETAS, "beta_schedule": "linear"}, clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        movq=_movq(),
        **_prior(directory),
    ).save_pretrained(directory, safe_serialization=True)


def _roberta_tokenizer(directory: Path) -> XLMRobertaTokenizer:
    """T5's letters and words under the marks of an XLM-RoBERTa."""
    directory.mkdir(parents=True)
    tokenizer = t5_tokenizer(length=77)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    pieces = [(piece, -1.0 if piece.startswith("▁") else -9.0) for piece in vocabulary if not piece.startswith("<")]
    marks = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return XLMRobertaTokenizer(vocab=[*marks, *pieces, ("<mask>", 0.0)], model_max_length=77)


def kandinsky_2_2(directory: Path) -> None:
    """Like Kandinsky 2.2, prior and decoder in one directory: a pipeline that optimum cannot export."""
    KandinskyV22Img2ImgCombinedPipeline(
        unet=_unet(),
        scheduler=DDPMScheduler(**BETAS, clip_sample=False, thresholding=False),
        movq=_movq(),
        **_prior(directory),
    ).save_pretrained(directory, safe_serialization=True)


def _prior(directory: Path) -> dict[str, Any]:
    """The components of a prior, by the names that a combined pipeline gives them."""
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
    return {
        "prior_prior": prior.eval(),
        "prior_image_encoder": CLIPVisionModelWithProjection(vision).eval(),
        "prior_text_encoder": CLIPTextModelWithProjection(text_config(tokenizer)).eval(),
        "prior_tokenizer": tokenizer,
        "prior_scheduler": UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample=True),
        "prior_image_processor": CLIPImageProcessor(size=32, crop_size=32),
    }


def kandinsky_3(directory: Path) -> None:
    """Like Kandinsky 3: a T5 text encoder, a UNet of its own and a MoVQ, without a prior."""
    tokenizer = t5_tokenizer(length=128)
    unet = Kandinsky3UNet(
        time_embedding_dim=16,
        groups=2,
        attention_head_dim=4,
        layers_per_block=2,
        block_out_channels=(16, 32),
        cross_attention_dim=8,
        encoder_hid_dim=TEXT_WIDTH,
    ).eval()
    sample, text = torch.randn(2, 4, SAMPLE_SIZE, SAMPLE_SIZE), torch.randn(2, 128, TEXT_WIDTH)
    # Not of unit variance: it guides by a difference that random weights make so great that rounding would show.
    unet.conv_out.weight.mul_(0.15 / unet(sample, torch.tensor([500]), text, torch.ones(2, 128)).sample.std())
    unet.conv_out.bias.zero_()
    Kandinsky3Pipeline(
        tokenizer=tokenizer,
        text_encoder=t5_encoder(tokenizer, TEXT_WIDTH),
        unet=unet,
        scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True, thresholding=False),
        movq=_movq(),
    ).save_pretrained(directory, safe_serialization=True)


def _unet(**changes: Any) -> UNet2DConditionModel:
    """Kandinsky 2.2's UNet, but for `changes` of its configuration."""
    settings: dict[str, Any] = {
        "sample_size": SAMPLE_SIZE,
        "in_channels": 4,
        "out_channels": 8,
        "addition_embed_type": "image",
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "encoder_hid_dim": TEXT_WIDTH,
        "encoder_hid_dim_type": "image_proj",
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": 4,
        "resnet_time_scale_shift": "scale_shift",
        "class_embed_type": None,
    }
    return UNet2DConditionModel(**{**settings, **changes}).eval()


def _movq() -> VQModel:
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
    image = movq.decode(latents, force_not_quantize=True).sample
    movq.decoder.conv_out.weight.mul_(0.5 / image.std())
    movq.decoder.conv_out.bias.zero_()
    return movq
