"""Pipelines, and images of requests as they draw them, without an engine, as integers [H, W, 3]."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from img2img_server.bundle.manifest import read_manifest
from img2img_server.engine.cache import Cache
from img2img_server.engine.request import Pipeline, Request, run_alone
from img2img_server.runtime.control.nets import ControlNets
from img2img_server.runtime.diffusion.stepped import SteppedPipeline
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline


def load(bundle: Path, nets: ControlNets | None = None, **more: Any) -> SteppedPipeline:
    """The pipeline of a bundle on the CPU provider, with the ControlNets that its requests may name."""
    pipeline = load_pipeline(bundle, read_manifest(bundle), Execution("cpu"), Cache(2**24), controlnets=nets, **more)
    assert isinstance(pipeline, SteppedPipeline)
    return pipeline


def together(pipeline: Pipeline, batch: Sequence[Request]) -> list[np.ndarray[Any, Any]]:
    """The images of requests that share every call."""
    states = list(pipeline.prepare(batch))
    while states[0].step < states[0].step_count:
        pipeline.advance(states, pipeline.denoise(states))
    return [np.asarray(images[0], int) for images in pipeline.finish(states)]


def alone(pipeline: Pipeline, request: Request) -> np.ndarray[Any, Any]:
    """The first image of a request that has every call to itself."""
    return np.asarray(run_alone(pipeline, request)[0], int)
