"""Rotary tables match diffusers' embeddings, with the dimensions of the real models and thousands of tokens."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from diffusers.models.transformers.transformer_flux2 import Flux2PosEmbed
from diffusers.models.transformers.transformer_longcat_image import LongCatImagePosEmbed
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from diffusers.models.transformers.transformer_z_image import RopeEmbedder
from diffusers.pipelines.longcat_image.pipeline_longcat_image_edit import prepare_pos_ids
from img2img_server.runtime.common.rotary import (
    FLUX,
    FLUX_2,
    QWEN,
    Rotary,
    Z,
    flux_2_positions,
    flux_positions,
    longcat_positions,
    qwen_positions,
    z_positions,
)

SIZES = [(64, 48), (32, 33), (39, 45)]
"""The sizes of an image and two references, in tokens; with odd and even sides."""


def of_flux(positions: np.ndarray) -> torch.Tensor:
    return as_complex(FluxPosEmbed(10000, [16, 56, 56])(torch.from_numpy(positions)))


def of_longcat(positions: np.ndarray) -> torch.Tensor:
    """The table of a text, a result and a source as its pipeline places them, whatever `positions` are."""
    (height, width), start = SIZES[0], (512, 512)
    text = prepare_pos_ids(0, "text", num_token=512)
    images = [prepare_pos_ids(kind, "image", start, height=height, width=width) for kind in (1, 2)]
    return as_complex(LongCatImagePosEmbed(10000, [16, 56, 56])(torch.cat([text, *images])))


def of_flux_2(positions: np.ndarray) -> torch.Tensor:
    return as_complex(Flux2PosEmbed(2000, [32] * 4)(torch.from_numpy(positions)))


def of_z_image(positions: np.ndarray) -> torch.Tensor:
    table: torch.Tensor = RopeEmbedder(256.0, [32, 48, 48], [1024, 512, 512])(torch.from_numpy(positions))
    return table


def of_qwen(positions: np.ndarray) -> torch.Tensor:
    shapes = [[(1, *size) for size in SIZES]]
    image, text = QwenEmbedRope(10000, [16, 56, 56], scale_rope=True)(shapes, max_txt_seq_len=700, device=torch.device("cpu"))
    return torch.cat([text, image])


def as_complex(pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return torch.complex(pair[0][:, ::2], pair[1][:, ::2])


@pytest.mark.parametrize(
    ("rotary", "positions", "dims", "theirs"),
    [
        pytest.param(FLUX, flux_positions(512, SIZES), (16, 56, 56), of_flux, id="flux"),
        pytest.param(FLUX_2, flux_2_positions(512, SIZES), (32, 32, 32, 32), of_flux_2, id="flux 2"),
        pytest.param(FLUX, longcat_positions(512, SIZES[:1] * 2), (16, 56, 56), of_longcat, id="longcat"),
        pytest.param(QWEN, qwen_positions(700, SIZES), (16, 56, 56), of_qwen, id="qwen"),
        pytest.param(Z, z_positions(500, SIZES[0]), (32, 48, 48), of_z_image, id="z"),
    ],
)
def test_rotary_table_matches_diffusers(
    rotary: Rotary, positions: Any, dims: tuple[int, ...], theirs: Callable[[np.ndarray], torch.Tensor]
) -> None:
    joined = np.concatenate(positions)
    table, expected = rotary.table(joined, dims), theirs(joined).numpy()
    assert table.shape == (len(joined), 2, sum(dims) // 2)
    assert np.abs(np.stack([expected.real, expected.imag], axis=1) - table).max() < 1e-5


def test_z_image_positions_are_padded_to_multiples_of_32() -> None:
    text, image = z_positions(33, (5, 7))
    assert len(text) == 64
    assert len(image) == 64
    assert (image[:35, 0] == 65).all(), "the image begins after the filled text"
    assert not image[35:].any()
