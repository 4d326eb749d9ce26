"""A pipeline with diffusers' interface but no model: it counts, fails on request, and draws noise from its generators."""

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image


class FakeDiffusers:
    """Draws each image in one colour, the first that its generator gives.

    A prompt can ask for trouble in the second step: "fail". Calls of more images than `room` run out of memory there. `calls`
    has the prompts of each call.
    """

    def __init__(self, room: int | None = None) -> None:
        self.room = room
        self.calls: list[list[str]] = []
        self._counts = Counter[str]()  # a call runs on a copy of the pipeline
        self.image_processor = SimpleNamespace(config=SimpleNamespace(vae_scale_factor=8))
        self.components: dict[str, Any] = {}
        self.config: dict[str, Any] = {}

    @property
    def steps(self) -> int:
        """Steps that were run, of all calls."""
        return self._counts["steps"]

    @property
    def unwound(self) -> int:
        """Calls that did not come to their end."""
        return self._counts["unwound"]

    def set_progress_bar_config(self, **settings: Any) -> None:
        pass

    def __call__(
        self,
        prompt: str | list[str],
        image: Image.Image | list[Image.Image],
        generator: torch.Generator | list[torch.Generator],
        strength: float,
        num_inference_steps: int,
        guidance_scale: float,
        output_type: str,
        callback_on_step_end: Callable[..., Any],
    ) -> SimpleNamespace:
        prompts = prompt if isinstance(prompt, list) else [prompt]
        sources = image if isinstance(image, list) else [image]
        generators = generator if isinstance(generator, list) else [generator]
        assert len(prompts) == len(sources) == len(generators)
        self.calls.append(prompts)
        colours = [tuple(torch.randint(256, (3,), generator=item).tolist()) for item in generators]
        ended = False
        try:
            for step in range(int(num_inference_steps * strength)):
                if step == 1 and any("fail" in item for item in prompts):
                    raise RuntimeError("told to fail")
                if step == 1 and self.room is not None and len(prompts) > self.room:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                self._counts["steps"] += 1
                callback_on_step_end(self, step, None, {})
            ended = True
        finally:
            self._counts["unwound"] += not ended
        return SimpleNamespace(
            images=[Image.new("RGB", item.size, colour) for item, colour in zip(sources, colours, strict=True)]
        )
