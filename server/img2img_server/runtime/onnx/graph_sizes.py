"""Input shapes of a bundle's graphs for a bucket, and a trial run of a graph on zeros."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from img2img_server.bundle.component_config import read_config
from img2img_server.errors import BundleError
from img2img_server.runtime.common.pipe import latent_size
from img2img_server.runtime.common.vae import widths_of
from img2img_server.runtime.execution import Bucket
from img2img_server.runtime.onnx.providers import ERRORS
from img2img_server.runtime.onnx.runners import Runner, dtype_of

Shapes = tuple[tuple[int, ...], ...]
"""The shape of each input of a graph, in the graph's order."""


class Sizes:
    """The sizes of the axes of a bundle's graphs for a bucket.

    Known for the UNet, the VAE and the text encoders of Stable Diffusion.
    """

    def __init__(self, bundle: Path) -> None:
        unet, vae = _config(bundle, "unet"), _config(bundle, "vae_decoder")
        self._scale = 2 ** max(len(widths_of(vae)) - 1, 0)
        encoders = [_config(bundle, name).get("max_position_embeddings") for name in ("text_encoder", "text_encoder_2")]
        self._tokens = next((count for count in encoders if isinstance(count, int)), None)
        sides = latent_size(unet.get("sample_size"))
        self._trial = max(8, 2 ** len(unet.get("block_out_channels", ())))
        self.native = Bucket(sides[0] * self._scale, sides[1] * self._scale, 2) if sides is not None else None

    def trial(self) -> Bucket:
        """A small bucket for trial runs, whose image has 2 x 2 places at the UNet's deepest level.

        With 1 x 1 there in its first run, OpenVINO's graph for any shape was wrong for larger images from then on (2026.4, UNets
        of three and four levels: NaN in bfloat16, 13 and 122 % off in float32), before its fused kernels were turned off.
        """
        return Bucket(self._trial * self._scale, self._trial * self._scale, 1)

    def axes(self, name: str, inputs: Sequence[Any], bucket: Bucket) -> dict[str, int] | None:
        """The size of each dynamic axis in the inputs of the component `name`, by axis name; None if one is unknown."""
        found: dict[str, int] = {}
        for item in inputs:
            for index, axis in enumerate(item.shape):
                size = axis if isinstance(axis, int) else self._size(name, item.name, index, bucket)
                if size is None or found.setdefault(str(axis), size) != size:
                    return None
        return {axis: size for axis, size in found.items() if not axis.isdigit()}

    def _size(self, name: str, tensor: str, axis: int, bucket: Bucket) -> int | None:
        images = max(bucket.rows // 2, 1)
        pixels = {2: bucket.height, 3: bucket.width}
        latents = {place: side // self._scale for place, side in pixels.items()}
        text = {0: images, 1: self._tokens}
        known: dict[tuple[str, str], Mapping[int, int | None]] = {
            ("unet", "sample"): {0: bucket.rows, **latents},
            ("unet", "encoder_hidden_states"): {0: bucket.rows, 1: self._tokens},
            ("vae_encoder", "sample"): {0: images, **pixels},
            ("vae_decoder", "latent_sample"): {0: images, **latents},
            ("text_encoder", "input_ids"): text,
            ("text_encoder_2", "input_ids"): text,
        }
        other = {0: bucket.rows} if name == "unet" else {}
        return known.get((name, tensor), other).get(axis)


def shapes_of(inputs: Sequence[Any], axes: Mapping[str, int]) -> Shapes:
    """The shape of each input, with the dynamic axes' sizes taken from `axes`, by name."""
    return tuple(tuple(axis if isinstance(axis, int) else axes[axis] for axis in item.shape) for item in inputs)


def try_on_zeros(graph: Path, runner: Runner, axes: Mapping[str, int], device: str = "cpu") -> None:
    """Runs the graph once on zeros on `device`, because some providers fail only when a graph runs. `axes` has the size of each
    dynamic axis, by name. Raises BundleError."""
    shapes = shapes_of(runner.inputs, axes)
    feed = {
        item.name: torch.zeros(shape, dtype=dtype_of(item), device=device)
        for item, shape in zip(runner.inputs, shapes, strict=True)
    }
    try:
        runner.run(feed)
    except (*ERRORS, RuntimeError) as error:
        raise BundleError(f"{graph} does not run: {error}") from error


def _config(bundle: Path, component: str) -> dict[str, Any]:
    """The configuration of a component; empty if there is none, or it is damaged: loading it says why."""
    try:
        return read_config(bundle / component)
    except BundleError:
        return {}
