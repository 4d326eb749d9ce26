"""Runs a graph that was given in two: the waves of a timestep in float32, and the rest in whatever an engine computes in.

In bfloat16 the angle of a time embedding is off by radians: OpenVINO's error of a UNet's call was three times PyTorch's for it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from img2img_server.runtime.onnx.runners import Runner


class SplitGraphRunner:
    """A graph as two, of which `body` takes what `head` gives, by name. Implements Runner, with the whole graph's inputs."""

    def __init__(self, head: Runner, body: Runner) -> None:
        self._head = head
        self._body = body
        self._between = [item.name for item in head.outputs]
        whole = {item.name: item for item in (*head.inputs, *body.inputs) if item.name not in self._between}
        self.inputs: Sequence[Any] = list(whole.values())
        self.outputs: Sequence[Any] = body.outputs

    def run(self, feed: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Runs one after the other."""
        waves = self._head.run({item.name: feed[item.name] for item in self._head.inputs})
        known = {**feed, **dict(zip(self._between, waves, strict=True))}
        return self._body.run({item.name: known[item.name] for item in self._body.inputs})
