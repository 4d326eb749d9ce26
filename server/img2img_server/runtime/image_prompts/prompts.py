"""The image prompts of requests to one model: checks them, and makes the inputs of its control graph. The embeddings of an image,
and of no image for the negative prompt, are those of `prepare_ip_adapter_image_embeds` of diffusers' pipelines.
"""

import functools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from img2img_server.bundle.image_adapters import AdapterNeeds, ImageAdapterFiles, PromptKind
from img2img_server.bundle.image_prompts import STATES, layer_widths, states_width
from img2img_server.engine.cache import Cache
from img2img_server.engine.request import ImagePromptUse, Request
from img2img_server.errors import InvalidField
from img2img_server.runtime.common.adapter_store import AdapterStore
from img2img_server.runtime.common.device_copy import send
from img2img_server.runtime.companions import Companions
from img2img_server.runtime.image_encoders import ImageEncoder
from img2img_server.runtime.image_prompts.reading import AdapterWeights, read_adapter
from img2img_server.runtime.image_prompts.states import PromptStates, of_prompts
from img2img_server.runtime.onnx.modules import LaterGraph
from img2img_server.support.model_fields import IMAGE_PROMPTS, ModelFields

_MOST_NUMBERS = 2**26
"""Maximum numbers in the keys and values of a request's image prompts, for each of its rows: 2688 tokens of Stable Diffusion 1.5,
403 of SDXL."""


@dataclass(frozen=True, slots=True)
class ImageAdapterSettings:
    """The image adapters that a server's models share: their files, and the cache of those in memory."""

    files: ImageAdapterFiles
    cache: Cache


class ModelImagePrompts:
    """Image prompts of one model, whose UNet has this `config` and control graph. The keys and values of images are kept in
    `cache`. Thread-safe."""

    fields: ClassVar[ModelFields] = IMAGE_PROMPTS

    def __init__(
        self,
        settings: ImageAdapterSettings,
        companions: Companions,
        cache: Cache,
        config: Mapping[str, Any],
        control: LaterGraph,
    ) -> None:
        self._companions = companions
        self._cache = cache
        self._control = control
        self._kind = PromptKind(layer_widths(config), config["cross_attention_dim"])
        self._store = AdapterStore(settings.files, settings.cache, self._read)
        self._known: dict[str, tuple[AdapterNeeds, int | None]] = {}  # needs and number of tokens of checked adapters, by digest
        self._own = object()  # marks this model's entries of the cache

    def check(self, request: Request) -> None:
        """Reads and checks the adapters of the request, unless they were checked before, and opens the control graph. Raises
        InvalidField."""
        counts = [len(use.images) * self._tokens(index, use) for index, use in enumerate(request.image_prompts)]
        if not counts:
            return
        longest, most = max(counts), _MOST_NUMBERS // states_width(self._kind.layer_widths) // len(counts)
        if longest > most:
            raise InvalidField(
                f"image_prompts[{counts.index(longest)}].images",
                f"the adapter makes {longest} tokens of them, and this model takes {most} in each of {len(counts)} image "
                "prompts: send fewer images",
            )
        self._control.get()

    def of(self, request: Request, is_guided: bool, device: torch.device) -> PromptStates | None:
        """The control graph's inputs for the request's image prompts, on the device; None if none has an effect. Raises
        InvalidField."""
        if not request.image_prompts:
            return None
        self.check(request)
        uses = [(index, use) for index, use in enumerate(request.image_prompts) if use.scale]
        prompts = [self._prompt(index, use, request.cache_scope, is_guided, device) for index, use in uses]
        return of_prompts(prompts, self._control.get().input_types[STATES]) if prompts else None

    def close(self) -> None:
        """Removes this model's entries from the caches."""
        self._store.close()
        self._cache.drop(lambda key: key[0] is self._own)

    def _tokens(self, index: int, use: ImagePromptUse) -> int:
        """The number of tokens of each image. Raises InvalidField if the adapter does not fit the model or its image encoder."""
        encoder = self._companions.get(use.encoder, ImageEncoder)
        if use.digest not in self._known:
            self._adapter(index, use)
        needs, tokens = self._known[use.digest]
        if not needs.reads(encoder.widths):
            raise InvalidField(_field(index), f"image adapter '{use.adapter}' needs {needs}: '{use.encoder}' is another one")
        return encoder.tokens if tokens is None else tokens

    def _prompt(
        self, index: int, use: ImagePromptUse, scope: str, is_guided: bool, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keys and values [T, W] of the tokens of all images, and those of as many empty images for the negative prompt, with the
        scale in the values."""
        read = functools.cache(lambda: self._adapter(index, use))  # once for all images, even if the cache cannot keep it
        digests = use.image_digests or (b"",) * len(use.images)
        keyed = [(image, (scope, digest) if digest else None) for image, digest in zip(use.images, digests, strict=True)]
        positive = torch.cat([self._states(read, use, device, image, key) for image, key in keyed])
        negative = self._states(read, use, device, None, ()).repeat(len(use.images), 1) if is_guided else None
        if use.scale == 1:
            return positive, negative
        each = torch.tensor([width for width in self._kind.layer_widths for _ in range(2)])
        scales = send(torch.tensor([1.0, use.scale] * (len(each) // 2)).repeat_interleave(each), device)
        return positive * scales, None if negative is None else negative * scales

    def _states(
        self,
        read: Callable[[], AdapterWeights],
        use: ImagePromptUse,
        device: torch.device,
        image: Image.Image | None,
        key: tuple[Hashable, ...] | None,
    ) -> torch.Tensor:
        """Keys and values [N, W] of the tokens of an image, None for the empty one. Cached by `key`, None for not at all; `read`
        returns the adapter."""
        encoder = self._companions.get(use.encoder, ImageEncoder)
        # The digest of the encoder in memory: on a replica of Ray, the request's may be that of another version.
        whole = None if key is None else (self._own, use.digest, encoder.digest, *key)
        found: torch.Tensor | None = None if whole is None else self._cache.get(whole)
        if found is None:
            adapter = read()
            outputs = encoder.encode_nothing() if image is None else encoder.encode([image])
            found = adapter.states(send(outputs[adapter.needs.reads_states], device))
            if whole is not None:
                self._cache.put(whole, found, found.nbytes)
        return found

    def _adapter(self, index: int, use: ImagePromptUse) -> AdapterWeights:
        adapter = self._store.get(_field(index), use.adapter, use.digest)
        self._known[use.digest] = adapter.needs, adapter.projection.tokens
        return adapter

    def _read(self, path: Path) -> AdapterWeights:
        return read_adapter(path, self._kind)


@dataclass(frozen=True, slots=True)
class NoImagePrompts:
    """Refuses the image prompts of requests to a model that takes none; `why` completes "this model takes no image prompts: it
    ..."."""

    why: str
    fields: ClassVar[ModelFields] = {}

    def check(self, request: Request) -> None:
        """Raises InvalidField if the request has image prompts."""
        if request.image_prompts:
            raise InvalidField("image_prompts", f"this model takes no image prompts: it {self.why}")

    def of(self, request: Request, is_guided: bool, device: Any) -> None:
        """Raises InvalidField if the request has image prompts."""
        self.check(request)

    def close(self) -> None:
        """Does nothing."""


def _field(index: int) -> str:
    return f"image_prompts[{index}].adapter"
