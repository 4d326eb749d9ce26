"""Encodes a request's texts and image, with a cache.

Both results depend only on content, which is the cache's key. Misses of several requests are computed together.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from PIL import Image

from img2img_server.engine.cache import Cache
from img2img_server.engine.request import Mask, Request
from img2img_server.runtime.common.device_copy import send
from img2img_server.runtime.common.vae import output_of, tensor_of
from img2img_server.runtime.diffusion.masking import redrawn_pixels
from img2img_server.runtime.lora.adapters import Choice

_Key = TypeVar("_Key", bound=Hashable)

_ImageKey = tuple[str, bytes | int]
"""A request's `cache_scope`, and the digest of its image, or a number if it has none."""

ScopedText = tuple[str, str, Choice | None]
"""A request's `cache_scope`, one of its texts, and the LoRAs of the text encoders."""

ScopedImage = tuple[str, Image.Image, bytes]
"""A request's `cache_scope`, one of its images, and that image's digest."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """The embedding of a text: `hidden_states` [1, T, D] and, for SDXL, SD 3 and Flux, `pooled` [1, P]. For Chroma, `pooled` is
    the mask [1, T] of the text's tokens."""

    hidden_states: torch.Tensor
    pooled: torch.Tensor | None

    @classmethod
    def split(cls, hidden_states: torch.Tensor, pooled: torch.Tensor | None = None) -> "list[Embedding]":
        """The embeddings of n texts, of `hidden_states` [n, T, D] and `pooled` [n, P]."""
        vectors = [None] * len(hidden_states) if pooled is None else torch.split(pooled, 1)
        return [cls(own, vector) for own, vector in zip(torch.split(hidden_states, 1), vectors, strict=True)]

    @property
    def bytes(self) -> int:
        """Its size in memory."""
        return self.hidden_states.nbytes + (0 if self.pooled is None else self.pooled.nbytes)

    def zeros(self) -> "Embedding":
        """An embedding of the same shape, all zeros."""
        return Embedding(torch.zeros_like(self.hidden_states), None if self.pooled is None else torch.zeros_like(self.pooled))


class Encoder:
    """Encodes texts and images with the components of a diffusers pipeline, through a cache that may be shared.

    `encode_texts` is the family's function: n texts, each with its LoRAs, to n embeddings, in one call of each text encoder.
    `pixels` makes the VAE's input of an image.
    """

    def __init__(
        self,
        pipe: Any,
        cache: Cache,
        encode_texts: Callable[[list[str], list[Choice | None]], list[Embedding]],
        pixels: Callable[[Image.Image], torch.Tensor],
    ) -> None:
        self._pipe = pipe
        self._cache = cache
        self._encode_texts = encode_texts
        self._pixels = pixels
        # Marks this encoder's entries. An id() could be reused after this encoder is freed, while its entries still exist.
        self._own = object()

    def texts(self, wanted: Sequence[ScopedText]) -> dict[ScopedText, Embedding]:
        """The embedding of each text; equal texts of one scope are encoded once."""
        # Without the LoRAs themselves, which would stay in memory with the cache's keys.
        keys: dict[ScopedText, tuple[Hashable, ...]] = {
            one: ("text", one[0], one[1], None if one[2] is None else one[2].key) for one in wanted
        }
        found, missing = self._look_up(keys)
        if missing:
            encoded = self._encode_texts([text for _, text, _ in missing], [choice for _, _, choice in missing])
            for key, embedding in zip(missing, encoded, strict=True):
                found[key] = embedding
                self._cache.put((self._own, *keys[key]), embedding, embedding.bytes)
        return found

    def images(self, requests: Sequence[Request]) -> list[SimpleNamespace]:
        """The output of the VAE's encoder for each request's image (`common/vae.py`). Images of one size are encoded in one
        call."""
        return self._images([(request.cache_scope, request.image, request.image_digest) for request in requests])

    def references(self, request: Request) -> list[SimpleNamespace]:
        """The output of the VAE's encoder for each of the request's reference images."""
        digests = request.reference_digests or (b"",) * len(request.references)
        pairs = zip(request.references, digests, strict=True)
        return self._images([(request.cache_scope, image, digest) for image, digest in pairs])

    def control_images(self, request: Request, indices: Sequence[int]) -> list[SimpleNamespace]:
        """The output of the VAE's encoder for these control images of the request."""
        uses = [request.controls[index] for index in indices]
        return self._images([(request.cache_scope, use.image, use.image_digest) for use in uses], "control")

    def masked_images(self, requests: Sequence[Request], masks: Sequence[Mask]) -> list[SimpleNamespace]:
        """Like `images`, for the images without the redrawn parts of their masks."""
        wanted = []
        for request, mask in zip(requests, masks, strict=True):
            digest = request.image_digest + mask.digest if request.image_digest and mask.digest else b""
            wanted.append((request.cache_scope, request.image, digest))
        # The redrawn part becomes gray, as in diffusers' inpainting pipelines.
        pixels = lambda index: self._pixels(wanted[index][1]) * (1 - redrawn_pixels(masks[index].image))  # noqa: E731
        return self._images(wanted, "masked", pixels)

    def sized_images(
        self, requests: Sequence[Request], pixels: Callable[[Image.Image, tuple[int, int]], torch.Tensor]
    ) -> list[SimpleNamespace]:
        """Like `images`, for the images at the sizes of their requests' results: `pixels` makes the VAE's input of an image and a
        size."""
        wanted = []
        for request in requests:
            size = "{} x {}".format(*request.result_size).encode()
            wanted.append((request.cache_scope, request.image, request.image_digest and request.image_digest + size))
        return self._images(wanted, "sized", lambda index: pixels(requests[index].image, requests[index].result_size))

    def _images(
        self, wanted: Sequence[ScopedImage], kind: str = "image", pixels: Callable[[int], torch.Tensor] | None = None
    ) -> list[SimpleNamespace]:
        """The encodings of `wanted`; `pixels` makes the VAE's input of one by its index."""
        # An image without a digest is not cached.
        keys: list[_ImageKey] = [(scope, digest or index) for index, (scope, _, digest) in enumerate(wanted)]
        places = {key: index for index, key in enumerate(keys)}
        found, missing = self._look_up({key: (kind, *key) for key in places})
        made = {key: pixels(places[key]) if pixels else self._pixels(wanted[places[key]][1]) for key in missing}
        for shape in sorted({tuple(own.shape) for own in made.values()}):
            together = [key for key in missing if made[key].shape == shape]
            encoded = self._encode_pixels(torch.cat([made[key] for key in together]))
            for key, own in zip(together, torch.split(encoded, 1), strict=True):
                found[key] = own
                if isinstance(key[1], bytes):
                    self._cache.put((self._own, kind, *key), own, own.nbytes)
        return [output_of(found[key], self._pipe.vae.config) for key in keys]

    def seen(self, request: Request, text: str, encode: Callable[[], Embedding]) -> Embedding:
        """The embedding that `encode` makes of a text and the request's images. Cached if all images have a digest."""
        digests = (request.image_digest, *request.reference_digests)
        key = (self._own, "seen", request.cache_scope, digests, text)
        is_cached = all(digests) and len(digests) == 1 + len(request.references)
        found: Embedding | None = self._cache.get(key) if is_cached else None
        if found is None:
            found = encode()
            if is_cached:
                self._cache.put(key, found, found.bytes)
        return found

    def close(self) -> None:
        """Removes this encoder's entries from the cache."""
        self._cache.drop(lambda key: key[0] is self._own)

    def _encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        vae = self._pipe.vae
        return tensor_of(vae.encode(send(pixels, vae.device, vae.dtype)))

    def _look_up(self, keys: dict[_Key, tuple[Hashable, ...]]) -> tuple[dict[_Key, Any], list[_Key]]:
        """The cached values by key, and the keys that are not cached."""
        cached = {key: self._cache.get((self._own, *suffix)) for key, suffix in keys.items()}
        return (
            {key: value for key, value in cached.items() if value is not None},
            [key for key, value in cached.items() if value is None],
        )


class Encoded:
    """A VAE that returns an image's encoding, which was computed before."""

    def __init__(self, vae: Any, output: SimpleNamespace) -> None:
        self._vae = vae
        self._output = output

    def encode(self, pixels: torch.Tensor) -> SimpleNamespace:
        """The encoding, whatever `pixels` are."""
        return self._output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)
