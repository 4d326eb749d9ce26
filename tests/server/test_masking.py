"""Masks in the engine's steps: only requests with a mask pay for them, with a constant number of operations."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import make_request, run_out
from img2img_server.bundle.manifest import read_manifest
from img2img_server.engine.cache import Cache
from img2img_server.engine.engine import Engine
from img2img_server.engine.request import Completed, Event, Failed, Mask, Request
from img2img_server.runtime.diffusion import masking, stepped
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from PIL import Image
from torch_operations import Counting

SIZE = (64, 64)


@pytest.fixture(scope="module")
def pipeline(bundle: Callable[[str], Path]) -> Any:
    return load_pipeline(bundle("sd1"), read_manifest(bundle("sd1")), Execution("cpu"), Cache(2**24))


def source() -> Image.Image:
    return Image.radial_gradient("L").resize(SIZE).convert("RGB")


def half(left: bool = True) -> Mask:
    """A mask that redraws one half."""
    image = Image.new("L", SIZE, 0)
    image.paste(255, (0, 0, 32, 64) if left else (32, 0, 64, 64))
    return Mask(image, b"left" if left else b"right")


def asked(mask: Mask | None, seed: int = 1, **settings: Any) -> Request:
    given: dict[str, Any] = {
        "strength": 0.8,
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "image_digest": b"source",
        **settings,
    }
    return make_request(prompt="a lake", image=source(), seeds=(seed,), mask=mask, **given)


def operations(pipeline: Any, masks: Sequence[Mask | None]) -> int:
    """torch's operations in the second step of requests with these masks, each of another strength."""
    states = pipeline.prepare([asked(mask, number, strength=1 - number / 20) for number, mask in enumerate(masks)])
    pipeline.advance(states, pipeline.denoise(states))
    noises = pipeline.denoise(states)
    with Counting() as counting:
        pipeline.advance(states, noises)
    return int(counting.count)


def test_mask_adds_few_operations_and_no_mask_adds_none(pipeline: Any) -> None:
    without = operations(pipeline, [None] * 4)
    one = operations(pipeline, [half(), None, None, None])
    assert one == without + 5
    assert operations(pipeline, [half(), half(left=False), half(), None]) == one
    assert operations(pipeline, [half()] * 4) == one


def test_source_is_encoded_once_for_different_masks(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    encode = pipeline._pipe.vae.encode

    def counted(pixels: torch.Tensor) -> Any:
        encoded.append(len(pixels))
        return encode(pixels)

    monkeypatch.setitem(pipeline._pipe.vae.__dict__, "encode", counted)
    other: dict[str, Any] = {"image_digest": b"another source"}
    pipeline.prepare([asked(half(), **other), asked(half(left=False), **other), asked(None, **other)])
    pipeline.prepare([asked(half(left=False), 7, **other)])
    assert encoded == [1]


def test_failed_blend_leaves_states_unchanged_and_fails_one_request(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """If memory runs out before a step, each request is retried alone from its current state."""
    kept_latents = masking.kept_latents

    def scarce(blends: Sequence[Any], steps: Sequence[int]) -> Any:
        if len(blends) > 1 or steps[0] == 4:  # the last step of the second request
            raise MemoryError
        return kept_latents(blends, steps)

    def drawn(requests: Sequence[Request]) -> list[Event]:
        engine = Engine({"m": pipeline})
        heard: list[list[Event]] = [[] for _ in requests]
        for request, events in zip(requests, heard, strict=True):
            engine.submit(request, events.append)
        run_out(engine)
        return [events[-1] for events in heard]

    requests = [asked(half(), 1, strength=0.6), asked(half(), 2), asked(None, 3)]
    (expected,) = drawn(requests[:1])
    assert isinstance(expected, Completed)
    monkeypatch.setattr(stepped, "kept_latents", scarce)
    first, second, third = drawn(requests)
    assert isinstance(first, Completed)
    assert isinstance(second, Failed)
    assert isinstance(third, Completed)
    assert np.abs(np.asarray(first.images[0], int) - np.asarray(expected.images[0], int)).max() <= 1


def test_a_preview_shows_the_source_outside_the_mask(pipeline: Any) -> None:
    def previews(mask: Mask) -> list[Any]:
        (state,) = pipeline.prepare([asked(mask, preview_interval=1)])
        found = []
        while state.step < state.step_count:
            pipeline.advance([state], pipeline.denoise([state]))
            found.append(state.original())
        return found

    nothing = Mask(Image.new("L", SIZE, 0))
    (kept, *others), drawn = previews(nothing), previews(half())
    assert all(torch.equal(kept, other) for other in others), "the source, without noise"
    for original in drawn:
        assert torch.equal(original[..., 4:], kept[..., 4:])
        assert not torch.allclose(original[..., :4], kept[..., :4], atol=0.1)


def test_masked_sources_of_requests_that_arrive_together_are_encoded_in_one_call(
    bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second request encodes none: they are cached by source and mask."""
    pipeline: Any = load_pipeline(bundle("sd-inpaint"), read_manifest(bundle("sd-inpaint")), Execution("cpu"), Cache(2**24))
    rows, encode = [], pipeline._encoder._encode_pixels

    def encode_pixels(pixels: torch.Tensor) -> torch.Tensor:
        rows.append(len(pixels))
        encoded: torch.Tensor = encode(pixels)
        return encoded

    monkeypatch.setattr(pipeline._encoder, "_encode_pixels", encode_pixels)
    requests = [asked(half()), asked(half(left=False), 2), asked(half(), 3)]
    first, other, same = pipeline.prepare(requests)
    assert rows == [1, 2], "one source, and two of its masked versions"
    given = [state.conditioning["inpainting"] for state in (first, other, same)]
    assert not torch.equal(given[0], given[1])
    assert all(
        torch.equal(state.conditioning["inpainting"], one) for state, one in zip(pipeline.prepare(requests), given, strict=True)
    )
    assert rows == [1, 2]
