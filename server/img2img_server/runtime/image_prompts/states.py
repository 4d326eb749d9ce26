"""The control graph's inputs for image prompts (bundle/image_prompts.py): of a request, and of the rows of a call."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from img2img_server.bundle.image_prompts import ADAPTER_COUNTS, BIAS, PADDING, STATES, TOKEN_COUNTS, filled_up
from img2img_server.runtime.common.device_copy import send


@dataclass(frozen=True, slots=True, eq=False)
class PromptStates:
    """The image prompts of a request: keys and values of each prompt's tokens, [A, T, W] on the device, for the rows of the
    prompt and, if it is guided, those of the negative prompt. `bias` [A, T] marks the tokens that only fill up."""

    positive: torch.Tensor
    negative: torch.Tensor | None
    bias: torch.Tensor


def of_prompts(prompts: Sequence[tuple[torch.Tensor, torch.Tensor | None]], dtype: torch.dtype) -> PromptStates:
    """The states of prompts in order, each with keys and values [T, W] of the prompt's rows and of the negative prompt's."""
    longest = max(len(positive) for positive, _ in prompts)
    negatives = [negative for _, negative in prompts if negative is not None]
    bias = torch.full((len(prompts), longest), PADDING)
    for index, (positive, _) in enumerate(prompts):
        bias[index, : len(positive)] = 0
    return PromptStates(
        _stacked([positive for positive, _ in prompts], longest, dtype),
        _stacked(negatives, longest, dtype) if negatives else None,
        send(bias, prompts[0][0].device, dtype),
    )


def _stacked(parts: Sequence[torch.Tensor], length: int, dtype: torch.dtype) -> torch.Tensor:
    found = parts[0].new_zeros(len(parts), length, parts[0].shape[1], dtype=dtype)
    for index, part in enumerate(parts):
        found[index, : len(part)] = part
    return found


def joined(rows: Sequence[tuple[int, int, PromptStates | None]]) -> dict[str, torch.Tensor]:
    """The inputs, by name, for the rows of requests in order, each with its numbers of rows of the negative prompt and of the
    prompt. Empty if no request has image prompts."""
    known = [own for _, _, own in rows if own is not None]
    if not known:
        return {}
    total, first = sum(negative + positive for negative, positive, _ in rows), known[0].positive
    adapters = filled_up(max(len(own.bias) for own in known), ADAPTER_COUNTS)
    tokens = filled_up(max(own.bias.shape[1] for own in known), TOKEN_COUNTS)
    states, bias = first.new_zeros(total, adapters, tokens, first.shape[-1]), first.new_zeros(total, adapters, tokens)
    start = 0
    for negative, positive, own in rows:
        if own is not None:
            count, length = own.bias.shape
            for values, number in ((own.negative, negative), (own.positive, positive)):
                if number:
                    assert values is not None, "guided requests have states for the negative prompt"
                    states[start : start + number, :count, :length] = values
                    bias[start : start + number, :count, :length] = own.bias
                    bias[start : start + number, :count, length:] = PADDING
                start += number
        else:
            start += negative + positive
    return {STATES: states, BIAS: bias}
