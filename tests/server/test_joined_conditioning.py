"""The conditioning of a batch: joined once for a set of states, and kept no longer than they are."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from img2img_server.runtime.common.out_of_memory import KEEPERS
from img2img_server.runtime.diffusion.state import JoinedConditioning


def state(number: int, rows: int) -> Any:
    conditioning = {
        "encoder_hidden_states": torch.full((rows, 3, 2), float(number)),
        "text_embeds": torch.full((rows, 4), float(-number)),
        "time_ids": torch.full((rows, 6), number, dtype=torch.int64),
    }
    return SimpleNamespace(number=number, next_conditioning=conditioning, has_two=True, images=rows // 2, rows=rows, prompts=None)


@pytest.mark.parametrize("rows", [(1,), (2, 1), (1, 4, 2)])
def test_joined_rows_keep_the_order_of_the_states(rows: tuple[int, ...]) -> None:
    states = [state(number, count) for number, count in enumerate(rows)]
    joined = JoinedConditioning().get(states)
    assert joined.keys() == states[0].next_conditioning.keys()
    for name, tensor in joined.items():
        assert torch.equal(tensor, torch.cat([each.next_conditioning[name] for each in states])), name
        assert tensor.dtype == states[0].next_conditioning[name].dtype


def test_conditioning_is_joined_once_per_list_of_states() -> None:
    joined, one, two, three = JoinedConditioning(), state(1, 1), state(2, 2), state(3, 1)
    first = joined.get([one, two])
    assert all(again is tensor for again, tensor in zip(joined.get([one, two]).values(), first.values(), strict=True))
    assert joined.get([two, one])["time_ids"][:, 0].tolist() == [2, 2, 1]
    assert joined.get([one, three])["time_ids"][:, 0].tolist() == [1, 3]
    first.pop("time_ids")
    assert "time_ids" in joined.get([one, two]), "what was handed out is the caller's own"


def test_joined_conditioning_is_evicted_by_state_count_and_memory() -> None:
    joined, states = JoinedConditioning(most=2), [state(number, 1) for number in range(4)]
    kept = joined.get(states[:2])["time_ids"]
    joined.forget(states[2])
    assert joined.get(states[:2])["time_ids"] is kept
    joined.forget(states[1])
    assert joined.get(states[:2])["time_ids"] is not kept
    kept = joined.get(states[:2])["time_ids"]
    joined.get(states[1:3])
    joined.get(states[2:])
    assert joined.get(states[:2])["time_ids"] is not kept
    kept = joined.get(states[:2])["time_ids"]
    assert joined in KEEPERS
    joined.give_back()
    joined.forget(states[0])
    assert joined.get(states[:2])["time_ids"] is not kept


def test_large_batches_are_not_kept_together() -> None:
    states = [state(number, 2) for number in range(3)]
    size = sum(tensor.nbytes for tensor in states[0].next_conditioning.values())
    joined = JoinedConditioning(most_bytes=2 * size)
    kept = [joined.get([each])["time_ids"] for each in states]
    assert [joined.get([each])["time_ids"] is own for each, own in zip(states[1:], kept[1:], strict=True)] == [True, True]
    assert joined.get(states[:1])["time_ids"] is not kept[0]
    own = joined.get(states)["time_ids"]
    assert joined.get(states)["time_ids"] is own, "the last one is kept, however large it is"
