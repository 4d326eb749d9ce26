"""Tiny CLIP image encoders with random weights, in the layout of h94/IP-Adapter's folders."""

from pathlib import Path

import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

SIDE = 28
"""Pixels of a side of the images that they read: 4 x 4 patches."""


def build(directory: Path, letter: str) -> Path:
    """Saves an image encoder into `directory` and returns it. "g" is wider than "h", and has another activation."""
    with torch.random.fork_rng():
        torch.manual_seed(ord(letter))
        wide = letter == "g"
        config = CLIPVisionConfig(
            hidden_size=48 if wide else 32,
            intermediate_size=64,
            projection_dim=40 if wide else 24,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=7,
            hidden_act="quick_gelu" if wide else "gelu",
        )
        model = CLIPVisionModelWithProjection(config).eval()
        with torch.no_grad():
            # The image has a visible effect: the pooled token's own embedding is as large as those of patches.
            model.vision_model.embeddings.patch_embedding.weight.mul_(5)
        model.save_pretrained(directory, safe_serialization=True)
    return directory
