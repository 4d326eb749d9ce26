"""Cached traces of short_exports.py are identical to torch's."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from img2img_export.convert.parts import vae_parts
from img2img_export.convert.tracing import trace
from short_exports import traced_once


def test_trace_cache_is_keyed_by_part_shape_and_dtype(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    vae = AutoencoderKL.from_pretrained(tiny_model("sd1") / "vae", use_safetensors=True)
    encoder, decoder = vae_parts(vae)
    latents, pixels = {"latent_sample": torch.randn(2, 4, 5, 7)}, {"sample": torch.randn(2, 3, 16, 24)}
    traced = trace(vae, decoder, latents)
    with traced_once(tmp_path):
        for _ in range(2):
            kept = trace(vae, decoder, {"latent_sample": torch.randn(2, 4, 5, 7)})
            assert kept.model.SerializeToString(deterministic=True) == traced.model.SerializeToString(deterministic=True)
            assert kept.weights.keys() == traced.weights.keys()
        assert len(list(tmp_path.iterdir())) == 1
        trace(vae, encoder, pixels)
        trace(vae, decoder, latents, torch.float16)
        trace(vae, decoder, {"latent_sample": torch.randn(2, 4, 6, 7)})
        assert len(list(tmp_path.iterdir())) == 4
