"""The LoRAs of one model: read and checked when a request first names them, and kept in memory up to a number of bytes (LRU)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch

from img2img_server.bundle.adapter_files import AdapterProblem, LoraFiles
from img2img_server.bundle.adapters import RANKS, AdaptedLayer
from img2img_server.engine.cache import Cache
from img2img_server.engine.request import LoraUse, Request
from img2img_server.errors import InvalidField
from img2img_server.runtime.common.adapter_store import AdapterStore
from img2img_server.runtime.lora.reading import LoraLayer, name_among, read_layers
from img2img_server.support.model_fields import FieldRule, ModelFields

_MOST_RANK = RANKS[-1]

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")

Matrices = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Matrices by module: `down` [rank * taps, in] and `up` [out, rank], with alpha / rank in it (bundle/adapters.py)."""


def by_taps(down: torch.Tensor, taps: int) -> torch.Tensor:
    """A flattened kernel [..., rank, in * taps] as a LoRA graph takes it, [..., rank * taps, in]."""
    return down.reshape(*down.shape[:-1], -1, taps).transpose(-1, -2).flatten(-3, -2).contiguous()


@dataclass(frozen=True, slots=True)
class Ranks:
    """The largest ranks of LoRAs in a component: of its 3 x 3 convolutions, and of its other layers."""

    rank: int = 0
    kernel_rank: int = 0

    def __add__(self, other: "Ranks") -> "Ranks":
        return Ranks(self.rank + other.rank, self.kernel_rank + other.kernel_rank)

    def __bool__(self) -> bool:
        return self != _NO_RANKS


_NO_RANKS = Ranks()


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A LoRA in memory: its matrices by component, on the CPU, and its largest ranks in each component."""

    matrices: Mapping[str, Matrices]
    ranks: Mapping[str, Ranks]

    @property
    def bytes(self) -> int:
        """Its size in memory."""
        return sum(tensor.nbytes for layers in self.matrices.values() for pair in layers.values() for tensor in pair)


@dataclass(frozen=True, slots=True)
class Choice:
    """The LoRAs of one request, in order, with their scales. Two choices are equal if their files and scales are."""

    key: tuple[tuple[str, float], ...]
    adapters: tuple[Adapter, ...] = field(compare=False)

    def ranks(self, component: str) -> Ranks:
        """The ranks of all its LoRAs together in the component; false if they do not adapt it."""
        return sum((adapter.ranks.get(component, _NO_RANKS) for adapter in self.adapters), _NO_RANKS)


def for_texts(choice: Choice | None) -> Choice | None:
    """The choice if it adapts a text encoder, else None: equal texts then have one embedding."""
    return choice if choice is not None and any(choice.ranks(name) for name in TEXT_ENCODERS) else None


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The LoRAs that a server's models share: their files, the cache of those in memory, and the number of different LoRAs (with
    their scales) that share a call of a model."""

    files: LoraFiles
    cache: Cache
    slots: int


class ModelLoras:
    """Reads and checks LoRAs for one model.

    `layers` are the layers that its graphs adapt, by component; `components` are all components of the model. Thread-safe.
    """

    fields: ClassVar[ModelFields] = {"loras": FieldRule()}

    def __init__(
        self,
        settings: LoraSettings,
        pipeline_class: str,
        components: Sequence[str],
        unet_config: Mapping[str, object] | None,
        layers: Mapping[str, Sequence[AdaptedLayer]],
    ) -> None:
        self._pipeline_class = pipeline_class
        self._components = tuple(components)
        self._unet_config = unet_config
        self._layers = {component: {layer.name: layer for layer in own} for component, own in layers.items()}
        self._store = AdapterStore(settings.files, settings.cache, self._read)
        self._ranks: dict[str, Mapping[str, Ranks]] = {}  # by digest: those that were checked

    def check(self, request: Request) -> None:
        """Reads and checks the request's LoRAs, unless they were checked before. Raises InvalidField."""
        ranks = [self._checked(index, use) for index, use in enumerate(request.loras)]
        for component in self._layers:
            together = sum((own.get(component, _NO_RANKS) for own in ranks), _NO_RANKS)
            if (total := max(together.rank, together.kernel_rank)) > _MOST_RANK:
                raise InvalidField(
                    "loras", f"their ranks together are {total} in {component}, the maximum is {_MOST_RANK}: send fewer LoRAs"
                )

    def choice(self, request: Request) -> Choice | None:
        """The request's LoRAs, None if it has none. Raises InvalidField."""
        if not request.loras:
            return None
        self.check(request)
        adapters = tuple(self._adapter(index, use) for index, use in enumerate(request.loras))
        return Choice(tuple((use.digest, use.scale) for use in request.loras), adapters)

    def close(self) -> None:
        """Removes this model's entries from the cache."""
        self._store.close()

    def _checked(self, index: int, use: LoraUse) -> Mapping[str, Ranks]:
        if use.digest not in self._ranks:
            self._adapter(index, use)
        return self._ranks[use.digest]

    def _adapter(self, index: int, use: LoraUse) -> Adapter:
        adapter = self._store.get(f"loras[{index}].id", use.id, use.digest)
        self._ranks[use.digest] = adapter.ranks
        return adapter

    def _read(self, path: Path) -> Adapter:
        """Reads and checks a LoRA. Raises AdapterProblem if it does not fit this model."""
        return self._fitted(read_layers(path, self._pipeline_class, self._components, self._unet_config))

    def _fitted(self, layers: Sequence[LoraLayer]) -> Adapter:
        matrices: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
        ranks: dict[str, Ranks] = {}
        for item in layers:
            known = self._layers.get(item.component, {})
            layer = replace(item, module=name_among(known, item.module))
            if problem := self._problem(layer):
                raise AdapterProblem(problem)
            up = layer.up if layer.factor == 1.0 else layer.up.float() * layer.factor
            taps = known[layer.module].taps
            matrices.setdefault(layer.component, {})[layer.module] = (by_taps(layer.down.flatten(1), taps), up.contiguous())
            before, rank = ranks.get(layer.component, _NO_RANKS), up.shape[1]
            ranks[layer.component] = Ranks(
                max(before.rank, rank if taps == 1 else 0), max(before.kernel_rank, rank if taps > 1 else 0)
            )
        for component, own in ranks.items():
            if (rank := max(own.rank, own.kernel_rank)) > _MOST_RANK:
                raise AdapterProblem(
                    f"has rank {rank} in {component}, the maximum is {_MOST_RANK}: resize it, or fuse it at export"
                )
        return Adapter(matrices, ranks)

    def _problem(self, layer: LoraLayer) -> str:
        """Why the model's graphs cannot have this layer, or ""."""
        name = f"{layer.component}.{layer.module}"
        known = self._layers.get(layer.component, {}).get(layer.module)
        kernel = tuple(layer.down.shape[2:])
        if known is None and any(side > 1 for side in kernel):
            return (
                f"adapts {name}, a convolution of {' x '.join(map(str, kernel))}, which requests cannot adapt in this model: "
                "export the model again if an earlier version of img2img did, or fuse the LoRA (img2img export --lora)"
            )
        if known is None:
            return (
                f"adapts {name}, which is not a layer that requests can adapt in this model: "
                "it is for another model, or must be fused at export (img2img export --lora)"
            )
        found = (layer.up.shape[0], layer.down.shape[0], layer.up.shape[1], layer.down.flatten(1).shape[1])
        rank, ins = found[1], known.ins * known.taps
        if found != (known.outs, rank, rank, ins):
            return (
                f"does not fit the model: {name} has {ins} inputs and {known.outs} outputs in the model, "
                f"and {found[3]} and {found[0]} in the LoRA"
            )
        return ""


@dataclass(frozen=True, slots=True)
class NoLoras:
    """Refuses the LoRAs of requests to a model that takes none; `why` completes "this model takes no LoRAs: it ..."."""

    why: str
    fields: ClassVar[ModelFields] = {}

    def check(self, request: Request) -> None:
        """Raises InvalidField if the request has LoRAs."""
        if request.loras:
            raise InvalidField("loras", f"this model takes no LoRAs: it {self.why}")

    def choice(self, request: Request) -> None:
        """Raises InvalidField if the request has LoRAs."""
        self.check(request)

    def close(self) -> None:
        """Does nothing."""
