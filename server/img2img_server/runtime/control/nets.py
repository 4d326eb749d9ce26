"""ControlNets in memory: companions (companions.py), which requests to other models name in `controls`."""

from collections.abc import Mapping
from typing import Any

import torch

from img2img_server.bundle.control_kinds import FLUX_PIXELS, kind_of_net, pixels_of_latent
from img2img_server.bundle.controls import FLUX_CLASS, IMAGE, MODE, SCALE, UNION_CLASS
from img2img_server.errors import BundleError
from img2img_server.runtime.companions import Companion, Companions
from img2img_server.runtime.onnx.modules import Graph
from img2img_server.runtime.onnx.token_graphs import MARK

Inputs = Mapping[str, torch.Tensor]
"""Inputs of a denoiser's call, by name."""

_NATIVE_LATENTS, _TOKENS = 8, 77
"""Height and width in latents of the trial image, and tokens of its text."""


class ControlNet(Companion):
    """A loaded ControlNet, whose graph is on `device`, with its config.json. `scale` is the number of pixels of a latent, on each
    side; `widths` are the channels of its inputs and residuals, by name; `kind` says which models it fits; `parameters` is the
    number of its weights. `modes` is the number of control modes of a union, None for other ControlNets. If it `pools`, it
    applies only to the rows of the prompt, as in diffusers."""

    what = "ControlNet"
    needed: frozenset[str] = frozenset({IMAGE, SCALE, "sample", "timestep", "encoder_hidden_states"})
    """The inputs that its graph must have."""

    def __init__(
        self,
        graph: Graph,
        config: Mapping[str, Any],
        engine: str,
        device: str,
        companions: Companions | None = None,
        parameters: float = 0.0,
    ) -> None:
        super().__init__(graph, engine, device, companions)
        self.parameters = parameters
        self.modes = self._modes(config)
        self.pools = bool(config.get("global_pool_conditions"))
        self.widths = graph.widths
        self.kind = kind_of_net(config)
        self.scale, self.size_multiple = self._sizes(config)
        self.native_size = (_NATIVE_LATENTS * self.scale, _NATIVE_LATENTS * self.scale)
        self._config = config
        if missing := (self.needed | ({MODE} if self.modes is not None else set())) - graph.input_types.keys():
            raise BundleError(f"the ControlNet's graph has no input {min(missing)}: export it again")

    def __call__(
        self, images: torch.Tensor, modes: torch.Tensor, scales: torch.Tensor, inputs: Inputs
    ) -> dict[str, torch.Tensor]:
        """The residuals by name, each [rows, C, h, w], for control images as `pixels` has them, [rows, 3, H, W], their kinds
        [rows], which only unions read, their scales [rows], and the `inputs` of the denoiser's call."""
        return self._graph(**inputs, **{IMAGE: images, MODE: modes, SCALE: scales})

    @property
    def repeats(self) -> bool:
        """Whether blocks of Flux's transformer use its samples in turns."""
        return False

    def pixels(self, image: torch.Tensor) -> torch.Tensor:
        """The ControlNet's input for an image whose values are from 0 to 1."""
        return image

    def _modes(self, config: Mapping[str, Any]) -> int | None:
        return config["num_control_type"] if config.get("_class_name") == UNION_CLASS else None

    def _sizes(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """The number of pixels of a latent, and the number of which a side of an image is a multiple."""
        scale = pixels_of_latent(config)
        return scale, scale * 2 ** (len(config["down_block_types"]) - 1)

    def trial_inputs(self, width: int, height: int) -> Mapping[str, torch.Tensor]:
        """Zeros."""
        shapes: dict[str, tuple[int, ...]] = {
            name: (1, self.widths[name]) if name in self.widths else (1,) for name in self._graph.input_types
        }
        shapes["encoder_hidden_states"] = (1, _TOKENS, self.widths["encoder_hidden_states"])
        shapes |= self._trial_shapes(width, height)
        return {name: torch.zeros(shape, device=self._device) for name, shape in shapes.items()}

    def _trial_shapes(self, width: int, height: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the inputs whose sizes depend on that of the trial's image."""
        return {
            "sample": (1, self.widths["sample"], height // self.scale, width // self.scale),
            IMAGE: (1, self.widths[IMAGE], height, width),
        }


class FluxControlNet(ControlNet):
    """A ControlNet of Flux. If it `reads_latents`, its control images are packed latents of the model's VAE, [rows, N, C]."""

    needed = frozenset({IMAGE, SCALE, MARK, "hidden_states", "timestep", "encoder_hidden_states", "pooled_projections"})

    @property
    def reads_latents(self) -> bool:
        """Whether the control images are latents (InstantX') and not pixels (XLabs')."""
        return self._config.get("conditioning_embedding_channels") is None

    @property
    def repeats(self) -> bool:
        """Whether its samples are used in turns: diffusers does so for ControlNets that read pixels."""
        return not self.reads_latents

    def pixels(self, image: torch.Tensor) -> torch.Tensor:
        """The image with values from -1 to 1."""
        return 2 * image - 1

    def _modes(self, config: Mapping[str, Any]) -> int | None:
        modes: int | None = config.get("num_mode")
        return modes

    def _sizes(self, config: Mapping[str, Any]) -> tuple[int, int]:
        return FLUX_PIXELS, 2 * FLUX_PIXELS

    def _trial_shapes(self, width: int, height: int) -> dict[str, tuple[int, ...]]:
        tokens = (height // self.size_multiple) * (width // self.size_multiple)
        channels = self.widths["hidden_states"]
        image = (1, tokens, channels) if self.reads_latents else (1, 3, height, width)
        counts = {"text_rotary": _TOKENS, MARK: tokens}
        tables = {name: (1, count, 2, self.widths[name]) for name, count in counts.items()}
        return {"hidden_states": (1, tokens, channels), IMAGE: image, **tables}


def open_controlnet(
    graph: Graph, config: Mapping[str, Any], engine: str, device: str, companions: Companions | None, parameters: float
) -> ControlNet:
    """The ControlNet of a graph with this config.json. Raises BundleError."""
    kind = FluxControlNet if config.get("_class_name") == FLUX_CLASS else ControlNet
    return kind(graph, config, engine, device, companions, parameters)
