"""Pipelines and ControlNets on the CPU, and images of requests as they draw them, without an engine, as integers [H, W, 3]."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fakes import make_request
from img2img_export.verify.images import sample_image
from img2img_server.bundle.manifest import read_manifest
from img2img_server.engine.cache import Cache
from img2img_server.engine.request import Pipeline, Request, run_alone
from img2img_server.runtime.companions import Companion, Companions
from img2img_server.runtime.diffusion.stepped import SteppedPipeline
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline


def load(bundle: Path, nets: Companions | None = None, **more: Any) -> SteppedPipeline:
    """The pipeline of a bundle on the CPU provider, with the companions that its requests may name."""
    pipeline = load_pipeline(bundle, read_manifest(bundle), Execution("cpu"), Cache(2**24), companions=nets, **more)
    assert isinstance(pipeline, SteppedPipeline)
    return pipeline


def companions(folder: Path, bundles: Mapping[str, Path]) -> Companions:
    """ControlNets and image encoders in memory, by the ids that they have as links in `folder`."""
    known = Companions()
    for name, bundle in bundles.items():
        link = folder / name
        link.symlink_to(bundle)
        one = load_pipeline(link, read_manifest(link), Execution("cpu"), companions=known)
        assert isinstance(one, Companion)
        one.denoise(one.prepare([make_request(image=sample_image(*one.native_size))]))  # as the server tries it
    return known


class Counted:
    """A runner that counts the rows of its calls, which are those of the input `of`."""

    def __init__(self, runner: Any, of: str = "sample") -> None:
        self.inputs, self.outputs, self._runner, self._of = runner.inputs, runner.outputs, runner, of
        self.rows: list[int] = []

    def run(self, feed: Any) -> Any:
        self.rows.append(len(feed[self._of]))
        return self._runner.run(feed)


def together(pipeline: Pipeline, batch: Sequence[Request]) -> list[np.ndarray[Any, Any]]:
    """The images of requests that share every call."""
    states = list(pipeline.prepare(batch))
    while states[0].step < states[0].step_count:
        pipeline.advance(states, pipeline.denoise(states))
    return [np.asarray(images[0], int) for images in pipeline.finish(states)]


def alone(pipeline: Pipeline, request: Request) -> np.ndarray[Any, Any]:
    """The first image of a request that has every call to itself."""
    return np.asarray(run_alone(pipeline, request)[0], int)
