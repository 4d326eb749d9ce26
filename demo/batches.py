"""Training data of the denoiser: latents grouped by layout, tokenized captions, and random batches of both.

Most samples are *pairs*. In image-to-image, denoising starts at step s from a noised source image. Relative to the target image,
the noise then contains a residue of the source that stays constant down to the last step:

    x_t = sqrt(a_t) target + sqrt(1 - a_t) (noise + k (source - target)),   k = sqrt(a_s / (1 - a_s)),  s >= t

where a is the scheduler's cumulative alpha (this follows from the DDIM step). A denoiser that predicts the bracket as noise takes
the colors from the caption and the layout from the source.
"""

from dataclasses import dataclass

import torch
from posterset import AUGMENTED, PosterSet
from scenes import Scene, all_scenes
from torch import Tensor
from transformers import CLIPTokenizer


@dataclass(frozen=True, slots=True)
class CaptionTable:
    """Token ids of captions for every possible scene: rows is scenes x forms x 32; empty is 32."""

    scenes: dict[Scene, int]
    rows: Tensor
    empty: Tensor


@dataclass(frozen=True, slots=True)
class LatentSet:
    """Latents, layouts x images x channels x h x w in any floating type, and each image's row in the caption table."""

    latents: Tensor
    scenes: Tensor
    captions: CaptionTable


@dataclass(frozen=True, slots=True)
class Batch:
    """One training batch: the denoiser's inputs (noisy, timesteps, token_ids), and its target, the velocity.

    `layouts` are the targets' in the set, and `left` is the first column of the strip, in latents.
    """

    noisy: Tensor
    timesteps: Tensor
    token_ids: Tensor
    target: Tensor
    layouts: Tensor
    left: int


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Padded token ids, N x the tokenizer's length."""
    ids: Tensor = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids


def make_caption_table(tokenizer: CLIPTokenizer, captions: list[str]) -> CaptionTable:
    """Tokenize the captions of `scenes.draw_captions`."""
    scenes = {scene: index for index, scene in enumerate(all_scenes())}
    rows = tokenize(tokenizer, captions).view(len(scenes), -1, tokenizer.model_max_length)
    return CaptionTable(scenes, rows, tokenize(tokenizer, [""])[0])


def make_latent_set(latents: Tensor, posters: PosterSet, captions: CaptionTable) -> LatentSet:
    """Group the latents of all posters (N x channels x h x w) by layout."""
    scenes = torch.tensor([captions.scenes[scene] for scene in posters.scenes])
    return LatentSet(latents.view(-1, posters.per_layout, *latents.shape[1:]), scenes.view(-1, posters.per_layout), captions)


@dataclass(frozen=True, slots=True)
class Mixture:
    """Shares of a batch: empty captions, pairs, and pairs whose source is not the noon image.

    For pairs, denoising starts at a step from `earliest_start` to `latest_start`, or at the sample's own step if later.
    """

    batch: int = 32
    empty_share: float = 0.12
    pair_share: float = 0.8
    other_source_share: float = 0.25
    other_layout_share: float = 0.0
    """The share of pairs whose source has another layout than the target, which only a control image then shows."""
    earliest_start: int = 450
    latest_start: int = 930


def draw_batch(data: LatentSet, alphas: Tensor, mixture: Mixture, width: int, random: torch.Generator) -> Batch:
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
    origins = rows
    if mixture.other_layout_share:
        origins = torch.where(chance(mixture.other_layout_share), torch.randint(layouts, (size,), generator=random), rows)
    target, source = strip[rows, columns].float(), strip[origins, sources].float()
    earliest = timesteps.clamp(min=min(mixture.earliest_start, last))
    latest = timesteps.clamp(min=min(mixture.latest_start, last))
    starts = earliest + (torch.rand(size, generator=random) * (latest + 1 - earliest)).long()
    residue = (alphas[starts] / (1 - alphas[starts])).sqrt() * chance(mixture.pair_share)
    noise = torch.randn(target.shape, generator=random) + residue[:, None, None, None] * (source - target)

    forms = torch.randint(data.captions.rows.shape[1], (size,), generator=random)
    token_ids = data.captions.rows[data.scenes[rows, columns], forms]
    token_ids = torch.where(chance(mixture.empty_share)[:, None], data.captions.empty, token_ids)
    signal, spread = alphas[timesteps][:, None, None, None].sqrt(), (1 - alphas[timesteps])[:, None, None, None].sqrt()
    return Batch(signal * target + spread * noise, timesteps, token_ids, signal * noise - spread * target, rows, left)
