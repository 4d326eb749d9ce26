"""The node. ComfyUI is imported only if it is installed, for the progress bar and the Cancel button."""

import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from img2img_client import Client, Completed, ImagePrompt, Progress, taken_options
from PIL import Image

MAX_SEED = 2**63 - 1


class Img2ImgServerTransform:
    """Transforms a batch of images on an img2img server, which may be another machine.

    The images of a batch are sent together, so that the server computes their steps in the same calls. With a seed of 0 or more
    the first image takes the seed, the second seed + 1, and so on; -1 draws a new seed for each.
    """

    CATEGORY = "image/img2img server"
    DESCRIPTION = "Transforms images on an img2img server."
    FUNCTION = "transform"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The fields of the node, with the server's defaults."""
        text = {"multiline": True, "dynamicPrompts": True}
        return {
            "required": {
                "image": ("IMAGE",),
                "prompt": ("STRING", {**text, "default": "A beautiful landscape with mountains and a lake at sunset"}),
                "negative_prompt": ("STRING", {**text, "default": ""}),
                "strength": ("FLOAT", {"default": 0.8, "min": 0.01, "max": 1.0, "step": 0.01}),
                "steps": ("INT", {"default": 25, "min": 1, "max": 100}),
                "guidance_scale": ("FLOAT", {"default": 7.5, "min": 0.0, "max": 30.0, "step": 0.1}),
                "seed": ("INT", {"default": -1, "min": -1, "max": MAX_SEED, "tooltip": "-1 draws one"}),
                "target": ("STRING", {"default": "localhost:50051", "tooltip": "host:port, or https://host:port for TLS"}),
            },
            "optional": {
                "model": ("STRING", {"default": "", "tooltip": "the model's id on the server; empty for its default"}),
                "scheduler": ("STRING", {"default": "", "tooltip": "such as DPM++ 2M Karras; empty for the model's own"}),
                "image_prompt": ("IMAGE",),
                "image_adapter": ("STRING", {"default": "", "tooltip": "the server's IP-Adapter that reads image_prompt"}),
                "image_prompt_scale": ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05}),
            },
        }

    @classmethod
    def IS_CHANGED(cls, seed: int = -1, **fields: Any) -> float | int:
        """A node with seed -1 makes a new image each time, so ComfyUI must not reuse its last output."""
        return float("nan") if seed == -1 else seed

    def transform(
        self,
        image: torch.Tensor,
        prompt: str,
        negative_prompt: str,
        strength: float,
        steps: int,
        guidance_scale: float,
        seed: int,
        target: str,
        model: str = "",
        scheduler: str = "",
        image_prompt: torch.Tensor | None = None,
        image_adapter: str = "",
        image_prompt_scale: float = 1.0,
    ) -> tuple[torch.Tensor]:
        """images x height x width x 3 in 0..1, and the same out. Errors are img2img_client's, such as InvalidRequest."""
        options: dict[str, Any] = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "strength": strength,
            "num_inference_steps": steps,
            "guidance_scale": guidance_scale,
            "model": model or None,
            "scheduler": scheduler or None,
        }
        sources = _images(image)
        token = os.environ.get("IMG2IMG_TOKEN")
        with Client(target, token=token) as client, ThreadPoolExecutor(len(sources)) as threads:
            options = dict(taken_options(options, client.models()))  # models that edit have no strength
            if image_prompt is not None or image_adapter:
                references = [] if image_prompt is None else _images(image_prompt)
                options["image_prompts"] = [ImagePrompt(image_adapter, references, image_prompt_scale)]
            step_done, interrupt = _hooks(len(sources) * max(1, int(steps * options.get("strength", 1.0))))

            def run(index: int) -> np.ndarray[Any, np.dtype[np.float32]]:
                own = {**options, "seed": seed if seed == -1 else seed + index}
                with client.transform_stream(sources[index], **own) as events:
                    for event in events:
                        interrupt()
                        if isinstance(event, Progress):
                            step_done()
                        if isinstance(event, Completed):
                            result = Image.open(io.BytesIO(event.result.images[0].data)).convert("RGB")
                            return np.asarray(result, np.float32) / 255
                raise AssertionError("a stream ends with Completed or an error")

            return (torch.from_numpy(np.stack(list(threads.map(run, range(len(sources)))))),)


def _images(batch: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(np.rint(np.clip(one, 0, 1) * 255).astype(np.uint8)) for one in batch[..., :3].cpu().numpy()]


def _hooks(steps: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """ComfyUI's progress bar of so many steps, and its check for Cancel, which raises; nothing without ComfyUI."""
    try:
        from comfy.model_management import throw_exception_if_processing_interrupted
        from comfy.utils import ProgressBar
    except ImportError:
        return (lambda: None), (lambda: None)
    bar = ProgressBar(steps)
    return (lambda: bar.update(1)), throw_exception_if_processing_interrupted


NODE_CLASS_MAPPINGS: dict[str, type] = {"Img2ImgServerTransform": Img2ImgServerTransform}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {"Img2ImgServerTransform": "Image to Image (img2img server)"}
