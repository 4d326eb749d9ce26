"""Sums the residuals of several ControlNets in a call of a denoiser, row by row."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from img2img_server.bundle.controls import SAMPLE_OF, SAMPLES, SINGLE_OF, SINGLES
from img2img_server.runtime.common.device_copy import send

Residuals = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Called:
    """The residuals of a ControlNet by name, each [len(rows), ...], for these rows of the denoiser's call. `order` is that of the
    control in its request. If it `repeats`, its samples of Flux's blocks are used in turns."""

    order: int
    rows: Sequence[int]
    values: Residuals
    repeats: bool = False


def of_unet(calls: Sequence[Called], total: int) -> Residuals:
    """The control graph's residuals for a UNet's call of `total` rows, by name, each [total, C, h, w]."""
    names = {name: None for call in calls for name in call.values}
    return {name: _summed([(call.rows, call.values[name]) for call in calls if name in call.values], total) for name in names}


def of_flux(calls: Sequence[Called], total: int, blocks: int, single_blocks: int) -> Residuals:
    """The further inputs of the control graph of Flux's transformer with these numbers of blocks, for a call of `total` rows:
    samples [total, K, N, D], and the sample of each block [total, L].

    Blocks with the same samples of all ControlNets share a sum.
    """
    found: Residuals = {}
    for name, index, count in ((SAMPLES, SAMPLE_OF, blocks), (SINGLES, SINGLE_OF, single_blocks)):
        own = [call for call in calls if name in call.values]
        layouts = [layout(call.values[name].shape[1], count, call.repeats and name == SAMPLES) for call in own]
        wanted = list(zip(*layouts, strict=True)) or [()] * count
        places = {samples: place for place, samples in enumerate(dict.fromkeys(wanted))}
        if not own:
            first = next(iter(calls[0].values.values()))
            found[name] = first.new_zeros(total, 1, *first.shape[2:])
        elif len(own) == 1 and len(own[0].rows) == total:
            found[name] = own[0].values[name]  # every row, in order
            places = {samples: samples[0] for samples in places}
        else:
            sums = [
                _summed([(call.rows, call.values[name][:, at]) for call, at in zip(own, samples, strict=True)], total)
                for samples in places
            ]
            found[name] = torch.stack(sums, dim=1)
        table = torch.tensor([places[samples] for samples in wanted])
        found[index] = send(table, found[name].device).expand(total, -1)
    return found


def layout(samples: int, blocks: int, repeats: bool) -> list[int]:
    """Which of a ControlNet's samples each block of Flux's transformer gets, as in FluxTransformer2DModel.forward."""
    each = -(-blocks // samples)
    return [block % samples if repeats else block // each for block in range(blocks)]


def _summed(parts: Sequence[tuple[Sequence[int], torch.Tensor]], total: int) -> torch.Tensor:
    """The sum of tensors [len(rows), ...], each at its rows, in a tensor [total, ...]."""
    (rows, value), *_ = parts
    if len(parts) == 1 and len(rows) == total:
        return value  # every row, in order
    found = value.new_zeros(total, *value.shape[1:])
    for rows, value in parts:
        found.index_add_(0, send(torch.tensor(rows), value.device), value)
    return found
