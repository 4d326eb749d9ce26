"""ONNX modules: ONNX graphs that replace torch modules in a diffusers pipeline.

Each is a torch module without parameters, so that diffusers, transformers and accelerate can treat it as any module (submodules,
parameters, hooks, mode), plus the attributes that diffusers' img2img pipelines read of the module it replaces. To the pipeline an
ONNX module is float32, whatever the graph's types: tensors are cast at the graph's inputs and outputs, so latents, guidance and
schedulers stay in float32 with a float16 graph.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import torch

from img2img_server.bundle.component_config import ComponentConfig, read_config
from img2img_server.bundle.controls import DOWN, MID, SAMPLES, is_residual
from img2img_server.bundle.image_prompts import BIAS, STATES
from img2img_server.bundle.speedups import FEATURES
from img2img_server.runtime.common.device_copy import send
from img2img_server.runtime.common.diffusers_import import diffusers
from img2img_server.runtime.common.pipe import parts
from img2img_server.runtime.common.vae import LATENT_STATISTICS, BoundedVae, output_of
from img2img_server.runtime.onnx.runners import Later, Runner, dtype_of, open_for, opened_bytes
from img2img_server.runtime.onnx.token_graphs import GRAPHS, TokenGraph
from img2img_server.support.device_lock import DEVICE_IN_USE

_TEXT_OUTPUTS = ("text_embeds", "last_hidden_state", "pooler_output")
"""The order of the outputs of transformers' text encoders."""


_HIDDEN_STATES = "hidden_states."
"""The names of hidden states begin with it, and end with their index."""

_PATCH = 4
"""Latents of a token of a transformer whose tokens are patches of two by two."""

_UNET_FORM = (0, "return_dict", "sample", "timestep", "encoder_hidden_states", "timestep_cond", "added_cond_kwargs")
_KNOWN_FORMS = {"UNet2DConditionModel": [_UNET_FORM, (*_UNET_FORM, DOWN)]}
"""Calls that a class accepts, as the number of arguments and the names of others: the server's own."""


class Graph:
    """An ONNX graph that is called with torch tensors by name. Casts them to its input types and ignores names without an input.

    `device` is where its runner expects tensors. `scalars` are its inputs without axes. `widths` are the numbers of channels or
    features of inputs and outputs, by name. Raises BundleError for types without an equivalent in torch.
    """

    def __init__(self, runner: Runner, device: str = "cpu") -> None:
        self._runner = runner
        self._device = torch.device(device)
        self.input_types = {item.name: dtype_of(item) for item in runner.inputs}
        self.outputs = [item.name for item in runner.outputs]
        self.row_buckets: Sequence[int] = getattr(runner, "row_buckets", ())
        """Numbers of rows that calls are padded to, ascending; empty if calls are not padded."""
        self.scalars = frozenset(item.name for item in runner.inputs if not item.shape)
        self.widths = _widths((*runner.inputs, *runner.outputs))

    def __call__(self, **tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Runs the graph. Returns its outputs by name, in the graph's order, in float32 and on the device of the first tensor."""
        feed, device = self._feed(tensors)
        return self._found(self._runner.run(feed), device)

    def _feed(self, tensors: Mapping[str, torch.Tensor | None]) -> tuple[dict[str, torch.Tensor], torch.device]:
        """The graph's inputs of the tensors, and the device that these are on."""
        given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        feed = {name: self._ready(name, tensor) for name, tensor in given.items() if name in self.input_types}
        return feed, next(iter(given.values())).device

    def _found(self, outputs: Sequence[torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
        named = zip(self.outputs, outputs, strict=True)
        return {name: send(value, device, torch.float32 if value.is_floating_point() else None) for name, value in named}

    def _ready(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.requires_grad:
            tensor = tensor.detach()
        return send(tensor, self._device, self.input_types[name]).contiguous()

    def open_for(self, width: int, height: int) -> None:
        """Opens what calls for images of this size, in pixels, need (runners.py). Does nothing if it was closed."""
        if (runner := self.__dict__.get("_runner")) is not None:
            open_for(runner, width, height)

    @property
    def opened_bytes(self) -> int:
        """The memory of what its runner opened after it was made, about. Any thread may read it."""
        return opened_bytes(self.__dict__.get("_runner"))

    def close(self) -> None:
        """Releases its runner, even if this graph is still referenced."""
        self.__dict__.pop("_runner", None)


class LaterGraph(Later[Graph]):
    """A graph that is opened when it is first needed, on any thread. `get` raises BundleError if it does not open.

    If `mixes`, rows that another graph could compute have that graph's results bit by bit. `bytes` is the size of its weights.
    `image_prompts` says whether it has the inputs of image prompts.
    """

    def __init__(self, open_graph: Callable[[], Graph], mixes: bool, size: int = 0, image_prompts: bool = False) -> None:
        def open_alone() -> Graph:
            with DEVICE_IN_USE:
                return open_graph()

        super().__init__(open_alone)
        self.mixes = mixes
        self.bytes = size
        self.image_prompts = image_prompts


class OnnxModule(torch.nn.Module):
    """Base of ONNX modules: the configuration in a component's folder, and the device and dtype of its tensors. Raises
    BundleError for a configuration that is damaged."""

    dtype = torch.float32

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        super().__init__()
        self.config = read_config(folder)
        self.device = torch.device(device)

    def to(self, *_: Any, **__: Any) -> Self:
        """Does nothing: a graph stays where its session is."""
        return self

    @property
    def graphs(self) -> list[Graph]:
        """Its graphs."""
        return [value for value in vars(self).values() if isinstance(value, Graph)]

    def open_for(self, width: int, height: int) -> None:
        """Opens what calls for images of this size, in pixels, need. Slow the first time; any thread may call it."""
        for graph in self.graphs:
            graph.open_for(width, height)

    def close(self) -> None:
        """Releases its graphs' runners, and with the last reference to them their sessions."""
        for graph in self.graphs:
            graph.close()


class OnnxTextEncoder(OnnxModule):
    """A text encoder (CLIP, T5, a language model): token ids [B, T] to its outputs in transformers' order, with the hidden states
    as a tuple. It has None for states that are not outputs of the graph.

    Raises BundleError if the configuration lacks the layers of the graph's hidden states.
    """

    def __init__(self, graph: Graph, folder: Path, device: str = "cpu") -> None:
        super().__init__(folder, device)
        self._graph = graph
        self._states = _state_names(graph.outputs, self.config)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        use_cache: bool = False,
    ) -> Any:
        """Encodes tokens, as transformers' ModelOutput. All hidden states of the graph are returned, whatever
        `output_hidden_states` is."""
        from transformers.utils import ModelOutput

        return ModelOutput(**self.outputs(input_ids, attention_mask))

    def outputs(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **more: torch.Tensor
    ) -> dict[str, Any]:
        """The outputs for tokens, by name and in transformers' order. `more` are other inputs of the graph."""
        outputs = self._graph(input_ids=input_ids, attention_mask=attention_mask, **more)
        hidden = tuple(outputs.pop(name, None) for name in self._states)
        # Pipelines access some outputs by index.
        ordered: dict[str, Any] = {name: outputs.pop(name) for name in _TEXT_OUTPUTS if name in outputs} | outputs
        return ordered | ({"hidden_states": hidden} if hidden else {})


class OnnxDenoiser(OnnxModule):
    """A UNet or transformer of any diffusers class. It is called like that class's `forward`, whose parameters have the names of
    the graph's inputs; the values of a dictionary are passed by their keys. A graph of tokens (token_graphs.py) has other inputs.

    `tokens` makes the inputs of such a graph; None for any other. `light` is a UNet's light graph, None for none, and `control`
    the graph for calls with residuals of ControlNets or with image prompts.
    """

    def __init__(
        self, graph: Graph, folder: Path, device: str = "cpu", light: Graph | None = None, control: LaterGraph | None = None
    ) -> None:
        super().__init__(folder, device)
        self._graph = graph
        self._light = light
        self.has_light = light is not None
        self.control = control
        name = self.config["_class_name"]
        if name not in dir(diffusers):
            raise self.config.problem("_class_name", f"is '{name}', which diffusers {diffusers.__version__} lacks")
        # To bind a call takes as long as the rest of `forward`, and to import the class seconds.
        self._accepted: set[tuple[object, ...]] = set(_KNOWN_FORMS.get(name, ()))
        # SDXL's pipeline reads the width of this layer to check the size of its added embeddings.
        width = self.config.get("projection_class_embeddings_input_dim")
        self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))
        self.in_channels = self.config.get("in_channels")
        channels = graph.widths.get("sample") or graph.widths.get("hidden_states")
        if self.in_channels and channels and channels not in (self.in_channels, _PATCH * self.in_channels):
            raise self.config.problem("in_channels", f"is {self.in_channels}, and the graph takes {channels} channels")
        self.row_buckets = graph.row_buckets
        self.input_types = graph.input_types
        kind = GRAPHS.get(name)
        self.tokens: TokenGraph | None = kind(self.config) if kind is not None and kind.mark in graph.input_types else None
        if self.tokens is not None:
            self.tokens.check(self.config, graph.widths)

    def predict(self, **inputs: Any) -> tuple[torch.Tensor]:
        """The output of the graph that takes these inputs; the values of a dictionary are passed by their keys."""
        graph, tensors = self._graph_for(_flatten(inputs))
        return (next(iter(graph(**tensors).values())),)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Predicts the noise. A scalar `timestep` applies to the whole batch. Raises TypeError for arguments that the class
        lacks."""
        form = (len(arguments), *named)
        if form not in self._accepted:
            self._signature.bind(self, *arguments, **named)
            self._accepted.add(form)
        bound = (dict(zip(list(self._signature.parameters)[1:], arguments, strict=False)) | named) if arguments else named
        if self.tokens is not None:
            made = self.tokens.output(bound, *self.predict(**self.tokens.inputs(bound)))
            return _denoised(made) if bound.get("return_dict", True) else (made,)
        graph, tensors = self._graph_for(self._tensors(bound))
        sample = next(iter(graph(**tensors).values()))
        return _denoised(sample) if bound.get("return_dict", True) else (sample,)

    def predict_with_features(self, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The prediction for arguments of `forward`, and the deep features, for `predict_light`."""
        graph, tensors = self._graph_for(self._tensors(named))
        outputs = graph(**tensors)
        return next(iter(outputs.values())), outputs[FEATURES]

    def predict_light(self, features: torch.Tensor, **named: Any) -> torch.Tensor:
        """The prediction for arguments of `forward`, by the light graph on deep `features` [R, C, h, w]."""
        assert self._light is not None, "there is a light graph"
        return next(iter(self._light(**self._tensors(named), **{FEATURES: features}).values()))

    def _graph_for(self, tensors: dict[str, torch.Tensor]) -> tuple[Graph, dict[str, torch.Tensor]]:
        """The graph that takes these inputs, and all of its inputs."""
        if self.control is None or not needs_control_graph(tensors):
            return self._graph, tensors
        graph = self.control.get()
        return graph, tensors | missing_inputs(graph.input_types, graph.widths, tensors)

    def _tensors(self, bound: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The graph's inputs for arguments of `forward`."""
        tensors = _flatten(bound)
        batch = next(iter(tensors.values())).shape[0]
        timestep = torch.as_tensor(bound["timestep"])
        # Graphs exported by other tools may have one timestep for the whole batch.
        alone = "timestep" in self._graph.scalars
        tensors["timestep"] = timestep.flatten()[0] if alone else timestep.expand(batch) if timestep.ndim == 0 else timestep
        return tensors

    @functools.cached_property
    def _signature(self) -> inspect.Signature:
        """The signature of the class's `forward`."""
        return inspect.signature(getattr(diffusers, self.config["_class_name"]).forward)

    @property
    def graphs(self) -> list[Graph]:
        """Its graphs that are open."""
        return [*super().graphs, *([self.control.opened] if self.control is not None and self.control.opened is not None else [])]

    @contextlib.contextmanager
    def cache_context(self, name: str) -> Any:
        """Does nothing: diffusers' caching hooks use it to keep values between steps, and a graph has no hooks."""
        yield


class OnnxVae(OnnxModule):
    """A VAE of two graphs: pixels [B, 3, H, W] in [-1, 1] to latents or a distribution of them, and back. A video's VAE
    (AutoencoderKLQwenImage) takes and returns videos of one frame, [B, C, 1, H, W].

    `bn` has the statistics of a batch norm of latents that pipelines read, if the VAE has them. A call takes at most `memory`
    bytes, None for no bound: see common/vae.py.
    """

    def __init__(self, encoder: Graph, decoder: Graph, folder: Path, device: str = "cpu", memory: int | None = None) -> None:
        super().__init__(folder, device)
        self._encoder = encoder
        self._decoder = decoder
        channels = decoder.widths.get("latent_sample")
        for name, wanted in {"latents_mean": 1, "latents_std": 1, **dict.fromkeys(LATENT_STATISTICS, _PATCH)}.items():
            if channels and (count := len(self.config.get(name) or ())) not in (0, wanted * channels):
                raise self.config.problem(name, f"has {count} items, and the graph takes {channels} channels")
        for name in ("latent_channels", "z_dim"):
            if channels and self.config.get(name, channels) != channels:
                raise self.config.problem(name, f"is {self.config[name]}, and the graph takes {channels} channels")
        statistics = {name: torch.tensor(self.config[name], device=device) for name in LATENT_STATISTICS if name in self.config}
        self.bn = SimpleNamespace(**statistics)
        self._bounded = BoundedVae(
            self.config,
            lambda pixels: encoder(sample=pixels)["latent_parameters"],
            lambda latents: decoder(latent_sample=latents)["sample"],
            memory,
            max((kind.itemsize for graph in (encoder, decoder) for kind in graph.input_types.values()), default=4),
            decoder.row_buckets,
        )
        if {"temperal_downsample", "dim_mult"} & self.config.keys():
            self.temperal_downsample = self.config["temperal_downsample"]  # Qwen-Image's pipelines read its length

    def encode(self, pixels: torch.Tensor) -> SimpleNamespace:
        """Encodes pixels to an output with `latent_dist` or `latents`: see common/vae.py."""
        return output_of(_by_frame(self._bounded.encode, pixels), self.config)

    def decode(self, latents: torch.Tensor, return_dict: bool = False, generator: Any = None) -> tuple[torch.Tensor]:
        """Decodes latents, already divided by the scaling factor, to pixels."""
        return (_by_frame(self._bounded.decode, latents),)


def close_graphs(pipe: Any) -> None:
    """Closes the ONNX modules of a diffusers pipeline and its inner pipelines. Must not be called during a call of them."""
    for part in parts(pipe):
        for component in getattr(part, "components", {}).values():
            if isinstance(component, OnnxModule):
                component.close()


def opened_later(pipe: Any) -> int:
    """The memory of the graphs that a diffusers pipeline's ONNX modules opened when calls needed them, about."""
    modules = {id(one): one for part in parts(pipe) for one in getattr(part, "components", {}).values()}
    return sum(graph.opened_bytes for one in modules.values() if isinstance(one, OnnxModule) for graph in one.graphs)


def _state_names(outputs: Sequence[str], config: ComponentConfig) -> list[str]:
    """The names of all hidden states of a text encoder, of which a language model's graph may lack some; empty if it has none."""
    found = [name for name in outputs if name.startswith(_HIDDEN_STATES)]
    if not found:
        return []
    of_text = config.part("text_config") if "text_config" in config else config
    names = [f"{_HIDDEN_STATES}{index}" for index in range(len(found))]
    if "num_hidden_layers" in of_text or set(found) != set(names):
        names = [f"{_HIDDEN_STATES}{index}" for index in range(of_text["num_hidden_layers"] + 1)]
    if missing := set(found) - set(names):
        raise of_text.problem("num_hidden_layers", f"is {len(names) - 1}, and the graph has '{min(missing)}'")
    return names


def _by_frame(function: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """The result of a function of images [B, C, H, W], which may be given as videos of one frame and is then returned as such."""
    return function(images) if images.ndim == 4 else function(images.squeeze(2)).unsqueeze(2)


def _denoised(sample: torch.Tensor) -> Any:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=sample)


def _widths(items: Sequence[Any]) -> dict[str, int]:
    """The fixed last axis of each tensor, of images the second: its channels or features."""
    axes = {
        item.name: item.shape[1 if len(item.shape) == 4 and isinstance(item.shape[1], int) else -1]
        for item in items
        if len(item.shape) > 1
    }
    return {name: axis for name, axis in axes.items() if isinstance(axis, int)}


def _flatten(arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors among a call's arguments and in their dictionaries, by name."""
    tensors: dict[str, torch.Tensor] = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif isinstance(value, Mapping):
            tensors |= _flatten(value)
    return tensors


def needs_control_graph(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a denoiser's call with these inputs is one of the control graph."""
    return MID in tensors or SAMPLES in tensors or STATES in tensors


def missing_inputs(
    types: Mapping[str, torch.dtype], widths: Mapping[str, int], tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Zeros for the inputs of a control graph that a call with `tensors` lacks; `types` and `widths` are its `input_types` and
    `widths`.

    They add exactly 0. Residuals have one place, [rows, C, 1, 1], which is added to all; image prompts have one adapter with one
    token.
    """
    first = next(iter(tensors.values()))
    ends: dict[str, tuple[int, ...]] = {name: (width, 1, 1) for name, width in widths.items() if is_residual(name)}
    if STATES in types:
        ends |= {STATES: (1, 1, widths[STATES]), BIAS: (1, 1)}
    return {
        name: first.new_zeros(len(first), *end, dtype=types[name])
        for name, end in ends.items()
        if name in types and name not in tensors
    }
