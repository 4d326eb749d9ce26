"""The image projection of an IP-Adapter: an image encoder's output -> tokens, as wide as those of texts.

The names are those in the files of h94/IP-Adapter, below `image_proj.`. Each kind computes the same as the diffusers class that
it names. diffusers' own modules are not used: importing its converter of these names takes seconds and more than 150 MB.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from img2img_server.bundle.image_adapters import Shapes
from img2img_server.runtime.common.device_copy import send

_PLAIN_TOKENS = 4
_HEAD = 64
"""Width of the heads of a resampler."""
_MULTIPLE = 4
"""How many times wider the hidden layer of a resampler's feed-forward network is."""


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """An image projection of a kind (bundle/image_adapters.py) with its weights by name, in any precision. It computes in fp32,
    on the device of its input."""

    kind: str
    weights: Mapping[str, torch.Tensor]

    def __call__(self, given: torch.Tensor) -> torch.Tensor:
        """The tokens [1, N, C] of an image, from its hidden states [1, T, H] or, for the plain kind, its embedding [1, P]."""
        return _KINDS[self.kind](self, given)

    @property
    def tokens(self) -> int | None:
        """The number of tokens of an image; None for one of each hidden state."""
        if self.kind == "plus":
            return self.weights["latents"].shape[1]
        return _PLAIN_TOKENS if self.kind == "plain" else None

    def get(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A weight in fp32, on the device of `like`."""
        return send(self.weights[name], like.device, torch.float32)

    def linear(self, name: str, given: torch.Tensor) -> torch.Tensor:
        """A linear layer, with its bias if it has one."""
        bias = self.get(f"{name}.bias", given) if f"{name}.bias" in self.weights else None
        return functional.linear(given, self.get(f"{name}.weight", given), bias)

    def norm(self, name: str, given: torch.Tensor) -> torch.Tensor:
        """A layer normalization."""
        weight = self.get(f"{name}.weight", given)
        return functional.layer_norm(given, weight.shape, weight, self.get(f"{name}.bias", given))


def _plain(own: Projection, embedding: torch.Tensor) -> torch.Tensor:
    """ImageProjection."""
    return own.norm("norm", own.linear("proj", embedding).reshape(len(embedding), _PLAIN_TOKENS, -1))


def _full(own: Projection, states: torch.Tensor) -> torch.Tensor:
    """IPAdapterFullImageProjection."""
    return own.norm("proj.3", own.linear("proj.2", functional.gelu(own.linear("proj.0", states))))


def _plus(own: Projection, states: torch.Tensor) -> torch.Tensor:
    """IPAdapterPlusImageProjection, a resampler."""
    latents, states = own.get("latents", states), own.linear("proj_in", states)
    for layer in range(_depth(own.weights)):
        at = f"layers.{layer}"
        queries = own.norm(f"{at}.0.norm2", latents)
        context = torch.cat([own.norm(f"{at}.0.norm1", states), queries], dim=-2)
        parts = own.linear(f"{at}.0.to_q", queries), *own.linear(f"{at}.0.to_kv", context).chunk(2, dim=-1)
        query, key, value = (part.reshape(*part.shape[:-1], -1, _HEAD).transpose(1, 2) for part in parts)
        attended = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        latents = own.linear(f"{at}.0.to_out", attended) + latents
        hidden = functional.gelu(own.linear(f"{at}.1.1", own.norm(f"{at}.1.0", latents)))
        latents = own.linear(f"{at}.1.3", hidden) + latents
    return own.norm("norm_out", own.linear("proj_out", latents))


def _depth(names: Mapping[str, object]) -> int:
    """The number of layers of a resampler."""
    return sum(name.startswith("layers.") and name.endswith(".0.to_q.weight") for name in names)


_KINDS: Mapping[str, Callable[[Projection, torch.Tensor], torch.Tensor]] = {"plain": _plain, "full": _full, "plus": _plus}


def shapes_of(kind: str, ins: int, outs: int, found: Shapes) -> Shapes:
    """The shapes that the weights of a projection must have: from `ins` numbers of the image encoder to tokens of `outs`. A
    resampler's own sizes are those in the shapes `found`. Raises LookupError if these do not have them."""
    if kind == "plain":
        rows = _PLAIN_TOKENS * outs
        return {"proj.weight": (rows, ins), "proj.bias": (rows,), **_norm("norm", outs)}
    if kind == "full":
        shapes = {"proj.0.weight": (ins, ins), "proj.0.bias": (ins,), "proj.2.weight": (outs, ins), "proj.2.bias": (outs,)}
        return {**shapes, **_norm("proj.3", outs)}
    tokens, width = found["latents"][1], found["latents"][2]
    inner = max(found["layers.0.0.to_q.weight"][0] // _HEAD, 1) * _HEAD
    shapes = {
        **{"latents": (1, tokens, width), "proj_in.weight": (width, ins), "proj_in.bias": (width,)},
        **{"proj_out.weight": (outs, width), "proj_out.bias": (outs,), **_norm("norm_out", outs)},
    }
    for layer in range(_depth(found)):
        shapes |= _layer(f"layers.{layer}", width, inner)
    return shapes


def _layer(name: str, width: int, inner: int) -> Shapes:
    """A layer of a resampler."""
    attention, network = f"{name}.0", f"{name}.1"
    return {
        **_norm(f"{attention}.norm1", width),
        **_norm(f"{attention}.norm2", width),
        f"{attention}.to_q.weight": (inner, width),
        f"{attention}.to_kv.weight": (2 * inner, width),
        f"{attention}.to_out.weight": (width, inner),
        **_norm(f"{network}.0", width),
        f"{network}.1.weight": (_MULTIPLE * width, width),
        f"{network}.3.weight": (width, _MULTIPLE * width),
    }


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
