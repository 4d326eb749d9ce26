"""Training data of the UNet: latents grouped by layout, tokenized captions, and random batches of both.

Half of the samples are *pairs*. In image-to-image, denoising starts at step s from a noised source image. Relative to the
target image, the noise then contains a residue of the source that stays constant down to the last step:

    x_t = sqrt(a_t) target + sqrt(1 - a_t) (noise + k (source - target)),   k = sqrt(a_s / (1 - a_s)),  s >= t

where a is the scheduler's cumulative alpha (this follows from the DDIM step). Predicting the whole bracket as "epsilon" teaches
an ordinary epsilon model to take the colours from the caption and the layout from the source.
"""

from dataclasses import dataclass

import numpy as np
import torch
from captions import KIND_PHRASES, Scene, draw_caption, draw_nameless_caption
from diffusers import AutoencoderKL
from make_data import MOODS, ImageSet
from torch import Tensor
from train_vae import encode
from transformers import CLIPTokenizer

AUGMENTED = 1
"""Index of the augmented source in a layout's group; it is never a target."""


@dataclass(frozen=True, slots=True)
class CaptionTable:
    """Token ids of captions for every possible scene: rows is scenes x forms x 32; empty is 32."""

    scenes: dict[Scene, int]
    rows: Tensor
    empty: Tensor


@dataclass(frozen=True, slots=True)
class LatentData:
    """Scaled latents, layouts x images x 4 x h x w, and for each image its row in the caption table."""

    latents: Tensor
    scenes: Tensor
    captions: CaptionTable


@dataclass(frozen=True, slots=True)
class Batch:
    """One training batch: the UNet's inputs (noisy, timesteps, token_ids) and its target."""

    noisy: Tensor
    timesteps: Tensor
    token_ids: Tensor
    target: Tensor


def all_scenes() -> list[Scene]:
    """Every combination of things and mood, in a fixed order."""
    return [
        Scene(kind, lake, trees, time, season)
        for kind in KIND_PHRASES
        for lake in (False, True)
        for trees in (False, True)
        for time, season in MOODS
    ]


@dataclass(frozen=True, slots=True)
class CaptionDraw:
    """How many captions each scene gets, and how many of them do not name the kind of land."""

    per_scene: int = 64
    nameless: int = 0
    seed: int = 3


def draw_captions(draw: CaptionDraw) -> list[str]:
    """The captions of each scene of `all_scenes`, scene by scene, with nameless captions first."""
    random = np.random.default_rng(draw.seed)
    captions = []
    for scene in all_scenes():
        captions += [draw_nameless_caption(scene, random) for _ in range(draw.nameless)]
        captions += [draw_caption(scene, random) for _ in range(draw.per_scene - draw.nameless)]
    return captions


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Padded token ids, N x the tokenizer's length."""
    encoded = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    ids: Tensor = encoded.input_ids
    return ids


def make_caption_table(tokenizer: CLIPTokenizer, captions: list[str]) -> CaptionTable:
    """Tokenize the captions of `draw_captions`."""
    scenes = {scene: index for index, scene in enumerate(all_scenes())}
    rows = tokenize(tokenizer, captions).view(len(scenes), -1, tokenizer.model_max_length)
    return CaptionTable(scenes, rows, tokenize(tokenizer, [""])[0])


def make_latents(images: ImageSet, vae: AutoencoderKL, captions: CaptionTable) -> LatentData:
    """Encode all images once, so that training the UNet does not need the autoencoder."""
    latents = encode(vae, images.pixels) * vae.config.scaling_factor
    scenes = torch.tensor([captions.scenes[scene] for scene in images.scenes])
    grouped = latents.unflatten(0, (-1, images.per_layout))
    return LatentData(grouped, scenes.view(-1, images.per_layout), captions)


@dataclass(frozen=True, slots=True)
class Mixture:
    """Shares of a batch: empty captions, pairs, and pairs whose source is not the noon image.

    For pairs, denoising starts at a step from `earliest_start` to `latest_start`, or at the sample's own step if later.
    """

    batch: int = 16
    empty_share: float = 0.12
    pair_share: float = 0.5
    other_source_share: float = 0.25
    earliest_start: int = 450
    latest_start: int = 999


def draw_batch(data: LatentData, alphas: Tensor, mixture: Mixture, width: int, random: torch.Generator) -> Batch:
    """Draw targets, captions, evenly spread timesteps, and for pairs a source and the step where denoising starts.

    `width` is in latents: if it is below the data's, the batch is a strip of full height at a random position.
    """
    layouts, images = data.scenes.shape
    size, last = mixture.batch, len(alphas) - 1

    def chance(share: float) -> Tensor:
        return torch.rand(size, generator=random) < share

    rows = torch.randint(layouts, (size,), generator=random)
    columns = torch.randint(images - 1, (size,), generator=random)
    columns = columns + (columns >= AUGMENTED)
    sources = torch.randint(AUGMENTED + 1, (size,), generator=random)
    others = torch.randint(images, (size,), generator=random)
    sources = torch.where(chance(mixture.other_source_share), others, sources)
    strata = (torch.arange(size) + torch.rand(size, generator=random)) / size
    timesteps = (strata * len(alphas)).long().clamp(max=last)

    left = int(torch.randint(data.latents.shape[-1] - width + 1, (1,), generator=random))
    strip = data.latents[..., left : left + width]
    target, source = strip[rows, columns], strip[rows, sources]
    earliest = timesteps.clamp(min=min(mixture.earliest_start, last))
    latest = timesteps.clamp(min=min(mixture.latest_start, last))
    starts = earliest + (torch.rand(size, generator=random) * (latest + 1 - earliest)).long()
    residue = (alphas[starts] / (1 - alphas[starts])).sqrt() * chance(mixture.pair_share)
    noise = torch.randn(target.shape, generator=random) + residue[:, None, None, None] * (source - target)

    forms = torch.randint(data.captions.rows.shape[1], (size,), generator=random)
    token_ids = data.captions.rows[data.scenes[rows, columns], forms]
    token_ids = torch.where(chance(mixture.empty_share)[:, None], data.captions.empty, token_ids)
    alpha = alphas[timesteps][:, None, None, None]
    return Batch(alpha.sqrt() * target + (1 - alpha).sqrt() * noise, timesteps, token_ids, noise)
