"""Pipelines as they are committed: fp16 weights in safetensors, and configurations without local paths."""

import json
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer


def prepare_for_publishing(directory: Path) -> None:
    """Make the weights world-readable, and remove local paths that diffusers writes into configurations."""
    for path in directory.rglob("*.safetensors"):
        path.chmod(0o644)
    for path in directory.rglob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        for key in ("_name_or_path", "name_or_path"):
            if content.pop(key, None) is not None:
                path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_pipeline(
    directory: Path,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    scheduler: DDIMScheduler,
) -> None:
    """Write a Stable Diffusion pipeline with fp16 weights; the modules given stay in fp32."""
    directory.mkdir(parents=True, exist_ok=True)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with tempfile.TemporaryDirectory() as scratch:
        pipeline.save_pretrained(scratch)
        half = StableDiffusionPipeline.from_pretrained(scratch, torch_dtype=torch.float16)
    half.save_pretrained(directory)
    tokenizer.backend_tokenizer.model.save(str(directory / "tokenizer"))  # vocab.json and merges.txt, for transformers 4
    prepare_for_publishing(directory)
