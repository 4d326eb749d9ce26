"""Images of requests as a pipeline draws them, without an engine, as integers [H, W, 3]."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from img2img_server.engine.request import Pipeline, Request, run_alone


def together(pipeline: Pipeline, batch: Sequence[Request]) -> list[np.ndarray[Any, Any]]:
    """The images of requests that share every call."""
    states = list(pipeline.prepare(batch))
    while states[0].step < states[0].step_count:
        pipeline.advance(states, pipeline.denoise(states))
    return [np.asarray(images[0], int) for images in pipeline.finish(states)]


def alone(pipeline: Pipeline, request: Request) -> np.ndarray[Any, Any]:
    """The first image of a request that has every call to itself."""
    return np.asarray(run_alone(pipeline, request)[0], int)
