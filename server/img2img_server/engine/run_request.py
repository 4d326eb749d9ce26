"""Runs one request without an engine: what the exporter verifies with, and what tests compare batches against."""

from collections.abc import Sequence

from PIL import Image

from img2img_server.engine.request import Pipeline, Request


def run_alone(pipeline: Pipeline, request: Request) -> Sequence[Image.Image]:
    """Runs `request` from start to end on the calling thread: one image for each of its seeds."""
    (state,) = pipeline.prepare([request])
    try:
        while state.step < state.step_count:
            pipeline.advance([state], pipeline.denoise([state]))
        (images,) = pipeline.finish([state])
        return images
    finally:
        pipeline.release(state)
