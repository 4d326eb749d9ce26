"""Stand-ins: ONNX graphs that take the places of torch modules in a diffusers pipeline.

Each has just the attributes that diffusers' img2img pipelines read of the module it stands for. Tensors go in and come out
as torch tensors on the CPU; between torch and ONNX Runtime they share memory.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from transformers import PretrainedConfig
from transformers.utils import ModelOutput

from img2img_server.pipelines.sessions import SessionOptions, open_session

_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
}


class Graph:
    """An ONNX graph that is called with torch tensors by name, casts them to its input types and ignores what it lacks."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self._inputs = {item.name: _DTYPES[item.type] for item in session.get_inputs()}
        self._outputs = [item.name for item in session.get_outputs()]
        self.dtype = _DTYPES[session.get_outputs()[0].type]

    def __call__(self, **tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Runs the graph; the outputs in the graph's order, by name."""
        feed = {
            name: tensor.to(self._inputs[name]).contiguous().numpy()
            for name, tensor in tensors.items()
            if tensor is not None and name in self._inputs
        }
        values = self._session.run(self._outputs, feed)
        return {name: torch.from_numpy(value) for name, value in zip(self._outputs, values, strict=True)}


class StandIn:
    """What every stand-in has: where it is, and the graphs' floating-point type."""

    device = torch.device("cpu")

    def __init__(self, dtype: torch.dtype, config: Any) -> None:
        self.dtype = dtype
        self.config = config

    def to(self, *_: Any, **__: Any) -> "StandIn":
        """Does nothing: a graph stays where its session is."""
        return self


class OnnxTextEncoder(StandIn):
    """A CLIP text encoder: token ids [B, T] to its outputs in the graph's order, and its hidden states as a tuple."""

    def __init__(self, folder: Path, options: SessionOptions) -> None:
        self._graph = Graph(open_session(folder / "model.onnx", options))
        super().__init__(self._graph.dtype, PretrainedConfig.from_json_file(folder / "config.json"))

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, output_hidden_states: bool = False
    ) -> ModelOutput:
        """Encodes tokens. `output_hidden_states` is obeyed by always giving those that the graph has."""
        outputs = self._graph(input_ids=input_ids, attention_mask=attention_mask)
        hidden = [outputs.pop(name) for name in list(outputs) if name.startswith("hidden_states.")]
        if hidden:
            outputs["hidden_states"] = tuple(hidden)  # type: ignore[assignment]
        return ModelOutput(**outputs)


class OnnxUNet(StandIn):
    """A conditional UNet: noised latents [B, C, h, w] and one timestep for each of B to predicted noise [B, C, h, w]."""

    def __init__(self, folder: Path, options: SessionOptions) -> None:
        self._graph = Graph(open_session(folder / "model.onnx", options))
        config = read_config(folder)
        super().__init__(self._graph.dtype, config)
        # SDXL's pipeline reads the width of this layer to check the size of its added embeddings.
        width = config.get("projection_class_embeddings_input_dim")
        self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    def __call__(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        timestep_cond: torch.Tensor | None = None,
        cross_attention_kwargs: None = None,
        return_dict: bool = False,
    ) -> tuple[torch.Tensor]:
        """Predicts the noise. A scalar `timestep` holds for the whole batch."""
        outputs = self._graph(
            sample=sample,
            timestep=timestep.expand(sample.shape[0]) if timestep.ndim == 0 else timestep,
            encoder_hidden_states=encoder_hidden_states,
            timestep_cond=timestep_cond,
            **(added_cond_kwargs or {}),
        )
        return (outputs["out_sample"],)


class OnnxVae(StandIn):
    """An AutoencoderKL made of two graphs: pixels [B, 3, H, W] in [-1, 1] to a latent distribution, and latents to pixels."""

    def __init__(self, encoder: Path, decoder: Path, options: SessionOptions) -> None:
        self._encoder = Graph(open_session(encoder / "model.onnx", options))
        self._decoder = Graph(open_session(decoder / "model.onnx", options))
        super().__init__(self._decoder.dtype, read_config(decoder))

    def encode(self, pixels: torch.Tensor) -> SimpleNamespace:
        """The distribution of the latents, as `latent_dist`."""
        parameters = self._encoder(sample=pixels)["latent_parameters"]
        return SimpleNamespace(latent_dist=DiagonalGaussianDistribution(parameters))

    def decode(self, latents: torch.Tensor, return_dict: bool = False, generator: Any = None) -> tuple[torch.Tensor]:
        """The pixels of latents that were divided by the scaling factor already."""
        return (self._decoder(latent_sample=latents)["sample"],)


def read_config(folder: Path) -> FrozenDict:
    """A component's config.json, with its values as attributes too."""
    return FrozenDict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
