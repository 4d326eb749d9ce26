"""Diffusers' own pipelines of tiny models, and images of the server's pipelines to compare with theirs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from fakes import Caller
from img2img_server.engine.engine import Engine
from img2img_server.engine.request import Completed, Pipeline, Request
from img2img_server.runtime.common.processors import loadable
from PIL import Image


def source(width: int, height: int) -> Image.Image:
    """Shades with stripes of a few pixels, which each resampling filter makes something else of."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    stripes = np.indices((height, width)).sum(0) % 5 * 51
    return Image.fromarray(np.stack([x, y, stripes], axis=-1).astype(np.uint8))


def oracle(directory: Path, pipeline_class: str) -> Any:
    """Diffusers' own pipeline. Parts that the saved model lacks are excluded by name, and processors that need torchvision for
    videos are loaded without them."""
    parts: dict[str, Any] = {}
    for name, entry in diffusers.DiffusionPipeline.load_config(directory).items():
        if entry == [None, None]:
            parts[name] = None
        elif isinstance(entry, list) and str(entry[1]).endswith("VLProcessor"):
            parts[name] = loadable(getattr(transformers, entry[1])).from_pretrained(directory / name)
    pipe = getattr(diffusers, pipeline_class).from_pretrained(directory, torch_dtype=torch.float32, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipeline: Pipeline, requests: list[Request]) -> list[tuple[Image.Image, ...]]:
    """The images of requests that an engine has at the same time."""
    engine = Engine({"m": pipeline})
    callers = [Caller(engine) for _ in requests]
    for request, caller in zip(requests, callers, strict=True):
        engine.submit(replace(request, model="m"), caller.events.append)
    while engine.step():
        pass
    endings = [caller.endings[0] for caller in callers]
    assert all(isinstance(ending, Completed) for ending in endings), endings
    return [ending.images for ending in endings if isinstance(ending, Completed)]
