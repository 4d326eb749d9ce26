"""CLIP's image encoder in memory: a companion (companions.py), which reads the images of image prompts."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image

from img2img_server.bundle.component_config import ComponentConfig
from img2img_server.bundle.image_encoders import EMBEDS, PIXELS, STATES, widths_of
from img2img_server.errors import BundleError
from img2img_server.images.sizes import centered_square
from img2img_server.runtime.common.device_copy import send
from img2img_server.runtime.common.torch_calls import torch_call
from img2img_server.runtime.companions import Companion, Companions
from img2img_server.runtime.onnx.modules import Graph

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""The mean and deviation of CLIP's training pixels, by channel. diffusers has no others for image prompts."""


class ImageEncoder(Companion):
    """An image encoder with this config.json, whose bundle has the SHA-256 `digest`. It reads squares of `side` pixels,
    and makes `tokens` hidden states of each."""

    what = "image encoder"

    def __init__(
        self,
        graph: Graph,
        config: ComponentConfig,
        digest: str,
        engine: str,
        device: str,
        companions: Companions | None = None,
    ) -> None:
        super().__init__(graph, engine, device, companions)
        self.digest = digest
        if not isinstance(config["patch_size"], int):
            raise config.problem("patch_size", f"is {config['patch_size']}, not a whole number")
        self.side = int(config["image_size"])
        self.native_size = (self.side, self.side)
        self.size_multiple = self.side
        self.widths = widths_of(config)
        self.tokens = (self.side // int(config["patch_size"])) ** 2 + 1
        if PIXELS not in graph.input_types:
            raise BundleError(f"the image encoder's graph has no input {PIXELS}: export it again")

    @property
    def projection_dim(self) -> int:
        """The numbers of an image's embedding."""
        return self.widths.projection_dim

    @property
    def hidden_size(self) -> int:
        """The numbers of each token's hidden state."""
        return self.widths.hidden_size

    @torch_call
    def encode(self, images: Sequence[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
        """The embeddings [images, projection_dim] and hidden states [images, tokens, hidden_size] of RGB images of any size, in
        fp32 on the graph's device.

        Each image has a call of its own, so its results do not depend on the others.
        """
        return self._encode([pixels(image, self.side) for image in images])

    @torch_call
    def encode_nothing(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same as `encode`, for the empty image that diffusers uses with the negative prompt: the embedding is zeros, and the
        hidden states are those of normalized pixels that are zeros."""
        embeds, states = self._encode([np.zeros((3, self.side, self.side), np.float32)])
        return torch.zeros_like(embeds), states

    def _encode(self, images: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        found = [self._graph(**{PIXELS: send(torch.from_numpy(image)[None], self._device)}) for image in images]
        return torch.cat([one[EMBEDS] for one in found]), torch.cat([one[STATES] for one in found])

    def trial_inputs(self, width: int, height: int) -> Mapping[str, torch.Tensor]:
        """Zeros."""
        return {PIXELS: torch.zeros((1, 3, height, width), device=self._device)}


def pixels(image: Image.Image, side: int) -> np.ndarray:
    """The normalized pixels [3, side, side] in fp32 of an RGB image's middle."""
    values = np.asarray(centered_square(image, side), np.float32) / 255
    normalized = (values - np.asarray(_MEAN, np.float32)) / np.asarray(_DEVIATION, np.float32)
    return np.ascontiguousarray(normalized.transpose(2, 0, 1))
