"""Graphs of the transformers whose classes in diffusers take positions, sizes or lists, which a graph cannot have as inputs.

Their graphs take batches of tokens and rotary tables, one row for each image: `text_rotary` and `image_rotary` [B, tokens, 2,
head / 2]. So rows of one call may have different prompts, timesteps and layouts of references. All rows have equally many image
tokens; texts are padded on the right, and `text_mask` says which of their tokens are attended to, if the family needs that.

Each class here turns a call of diffusers' class into the inputs of its graph, and the graph's output into the class's.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from img2img_server.bundle.component_config import ComponentConfig
from img2img_server.runtime.common import rotary
from img2img_server.runtime.common.rotary import Positions, Rotary, Size

Tensors = dict[str, torch.Tensor]
"""Inputs of a graph by name, each [B, ...]."""

MARK = "image_rotary"
"""The input with the rotary table of the images' tokens."""

PLACES = "image_places"
"""The input of Stable Diffusion 3's graph for where each of the images' tokens lies: indices [B, N] in a table of the model."""

_BIASED_MULTIPLE = 16
"""ONNX Runtime's CUTLASS attention takes a bias for sequences of a multiple of 16 tokens in fp32, and of 8 in half precision."""

_MOST_TABLES = 16
"""Layouts whose rotary tables are kept: up to 5 MB each."""


class TokenGraph:
    """The graph of a transformer of diffusers with the configuration `config`."""

    mark = MARK
    """The input that only this graph has."""
    _axes = "axes_dims_rope"
    _rotary: Rotary
    _positions: Callable[[int, Sequence[Size]], tuple[Positions, Positions]]

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._dims = tuple(config[self._axes])
        self._tables: dict[tuple[object, ...], Tensors] = {}

    def check(self, config: ComponentConfig, widths: Mapping[str, int]) -> None:
        """Raises BundleError if the configuration does not fit a graph whose inputs have these widths."""
        count, width = self._positions(1, [(2, 2)])[1].shape[1], 2 * widths[MARK]
        if len(self._dims) != count or any(dim % 2 for dim in self._dims) or sum(self._dims) != width:
            text = f"is {list(self._dims)}; the graph takes {count} even numbers whose sum is {width}"
            raise config.problem(self._axes, text)

    def inputs(self, call: Mapping[str, Any]) -> Tensors:
        """The graph's inputs for a call of diffusers' class with these arguments, by name."""
        raise NotImplementedError

    def output(self, call: Mapping[str, Any], sample: torch.Tensor) -> Any:
        """The graph's output in the form that diffusers' class returns."""
        return sample

    def conditions(self, text: torch.Tensor, sizes: Sequence[Size]) -> Tensors:
        """The inputs of one row that stay the same at every step: for a text's embedding [T, D], and the sizes of an image and
        its references."""
        return {"encoder_hidden_states": text[None], **self._tables_of(*self._positions(len(text), sizes))}

    def _tables_of(self, *positions: Positions) -> Tensors:
        """The rotary tables of a row whose text's and image's tokens are at these positions, [1, tokens, 2, head / 2]. Kept:
        diffusers' own loops (opaque pipelines) pass the same positions at every step."""
        key = tuple((part.shape, part.dtype.str, part.tobytes()) for part in positions)
        found = self._tables.get(key)
        if found is None:
            if len(self._tables) >= _MOST_TABLES:
                self._tables.clear()
            tables = (torch.from_numpy(self._rotary.table(part, self._dims))[None] for part in positions)
            found = self._tables[key] = dict(zip(("text_rotary", MARK), tables, strict=True))
        return found


class FluxTokens(TokenGraph):
    """Flux and its ControlNets, and Kontext, whose references' tokens follow the image's."""

    _rotary = rotary.FLUX
    _positions = staticmethod(rotary.flux_positions)

    def inputs(self, call: Mapping[str, Any]) -> Tensors:
        """Also `pooled_projections` [B, P] and, if the model has it, `guidance` [B]."""
        # diffusers uses the first row's positions for all rows.
        text, image = (call[name].reshape(-1, *call[name].shape[-2:])[0].cpu().numpy() for name in ("txt_ids", "img_ids"))
        rows = len(call["hidden_states"])
        tables = {name: table.expand(rows, -1, -1, -1) for name, table in self._tables_of(text, image).items()}
        names = ["hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"]
        if self._config.get("guidance_embeds"):
            names.append("guidance")
        return {name: call[name] for name in names if name in call} | tables


class Flux2Tokens(FluxTokens):
    """FLUX.2 and klein."""

    _rotary = rotary.FLUX_2
    _positions = staticmethod(rotary.flux_2_positions)


class ChromaTokens(FluxTokens):
    """Chroma. Its `prompt_mask` [B, T] is not a `text_mask`: it raises scores, and hides no token. So texts are not padded."""

    def inputs(self, call: Mapping[str, Any]) -> Tensors:
        """Also `prompt_mask`. A call without a mask has ones, which raise all scores alike."""
        text = call["encoder_hidden_states"]
        mask = torch.ones_like(text[..., 0]) if call.get("attention_mask") is None else call["attention_mask"]
        return super().inputs(call) | {"prompt_mask": mask[:, : text.shape[1]]}


class LongCatTokens(FluxTokens):
    """LongCat-Image-Edit."""

    _positions = staticmethod(rotary.longcat_positions)

    def conditions(self, text: torch.Tensor, sizes: Sequence[Size]) -> Tensors:
        """The base's inputs, and `text_mask` [1, T]."""
        return _masked(super().conditions(text, sizes))

    def inputs(self, call: Mapping[str, Any]) -> Tensors:
        """The base's inputs, and `text_mask`."""
        return super().inputs(call) | {"text_mask": torch.ones(call["encoder_hidden_states"].shape[:2], dtype=torch.bool)}


class QwenTokens(TokenGraph):
    """Qwen-Image and its edit models."""

    _rotary = rotary.QWEN
    _positions = staticmethod(rotary.qwen_positions)

    def conditions(self, text: torch.Tensor, sizes: Sequence[Size]) -> Tensors:
        """Also `text_mask` [1, T], and for models with `zero_cond_t` `is_reference` [1, N] (1 at references' tokens)."""
        found = _masked(super().conditions(text, sizes))
        if self._config.get("zero_cond_t"):
            image = sizes[0][0] * sizes[0][1]
            found["is_reference"] = (torch.arange(found[MARK].shape[1]) >= image).long()[None]
        return found

    def inputs(self, call: Mapping[str, Any]) -> Tensors:
        """The base's inputs and those of `conditions`."""
        sizes = [[(height, width) for _, height, width in shapes] for shapes in call["img_shapes"]]
        rows = [self.conditions(text, some) for text, some in zip(call["encoder_hidden_states"], sizes, strict=True)]
        found = join(rows) | {name: call[name] for name in ("hidden_states", "timestep")}
        mask = call.get("encoder_hidden_states_mask")
        return found if mask is None else found | {"text_mask": _padded(mask.bool(), found["text_mask"].shape[1])}


class ZTokens(TokenGraph):
    """Z-Image. `image_real` and `text_real` are false where the graph puts a learned pad token."""

    _axes = "axes_dims"
    _rotary = rotary.Z

    def inputs(self, call: Mapping[str, Any]) -> Tensors:
        """The latents and texts of a call are lists; all latents have one size."""
        tokens = filled(torch.stack([patches(latents) for latents in call["x"]]))
        sizes = [[(latents.shape[-2] // 2, latents.shape[-1] // 2)] for latents in call["x"]]
        rows = [self.conditions(text, some) for text, some in zip(call["cap_feats"], sizes, strict=True)]
        return {**join(rows), "hidden_states": tokens, "timestep": call["t"]}

    def conditions(self, text: torch.Tensor, sizes: Sequence[Size]) -> Tensors:
        """Also `text_mask`, `text_real` [1, T] and `image_real` [1, N]. The image has no references."""
        full, ((height, width),) = filled(text[None]), sizes
        image_real, text_real = (torch.ones(1, count, dtype=torch.bool) for count in (height * width, len(text)))
        return super().conditions(text, sizes) | {
            "encoder_hidden_states": full,
            "text_mask": torch.ones(full.shape[:2], dtype=torch.bool),
            "text_real": filled(text_real),
            "image_real": filled(image_real),
        }

    @staticmethod
    def _positions(text: int, sizes: Sequence[Size]) -> tuple[Positions, Positions]:
        return rotary.z_positions(text, sizes[0])

    def output(self, call: Mapping[str, Any], sample: torch.Tensor) -> Any:
        """A list of latents [C, 1, h, w]."""
        return [unpatched(tokens, latents.shape) for tokens, latents in zip(sample, call["x"], strict=True)]


class SD3Tokens(TokenGraph):
    """Stable Diffusion 3. It has a table of embeddings for positions, of which an image has the middle."""

    mark = PLACES

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._most = int(config["pos_embed_max_size"])

    def check(self, config: ComponentConfig, widths: Mapping[str, int]) -> None:
        """Checks the size of patches."""
        if (patch := config.get("patch_size", 2)) != 2:
            raise config.problem("patch_size", f"is {patch}, and the graph's patches are of 2 by 2 latents")

    def inputs(self, call: Mapping[str, Any]) -> Tensors:
        """Also `pooled_projections` [B, P]. The latents of a call have one size."""
        latents = call["hidden_states"]
        places = self._places((latents.shape[-2] // 2, latents.shape[-1] // 2)).expand(len(latents), -1)
        tokens = torch.stack([patches(one[:, None]) for one in latents])
        names = ("encoder_hidden_states", "pooled_projections", "timestep")
        return {**{name: call[name] for name in names}, "hidden_states": tokens, PLACES: places}

    def conditions(self, text: torch.Tensor, sizes: Sequence[Size]) -> Tensors:
        """The text's embedding, and the places. The image has no references."""
        return {"encoder_hidden_states": text[None], PLACES: self._places(sizes[0])}

    def output(self, call: Mapping[str, Any], sample: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, h, w]."""
        height, width = call["hidden_states"].shape[-2:]
        shape = (sample.shape[-1] // 4, 1, height, width)
        return torch.stack([unpatched(tokens, shape)[:, 0] for tokens in sample])

    def _places(self, size: Size) -> torch.Tensor:
        """The places of the tokens of an image, [1, N]."""
        down, right = (torch.arange(side) + (self._most - side) // 2 for side in size)
        return (down[:, None] * self._most + right).reshape(1, -1)


GRAPHS: dict[str, type[TokenGraph]] = {
    "SD3Transformer2DModel": SD3Tokens,
    "FluxTransformer2DModel": FluxTokens,
    "FluxControlNetModel": FluxTokens,
    "ChromaTransformer2DModel": ChromaTokens,
    "Flux2Transformer2DModel": Flux2Tokens,
    "LongCatImageTransformer2DModel": LongCatTokens,
    "QwenImageTransformer2DModel": QwenTokens,
    "ZImageTransformer2DModel": ZTokens,
}
"""The graphs' classes by the name of diffusers' class."""


def join(rows: Sequence[Tensors]) -> Tensors:
    """The inputs of several calls as one: rows after rows, sequences of different lengths padded with zeros on the right."""
    joined: Tensors = {}
    for name, first in rows[0].items():
        parts = [row[name] for row in rows]
        if first.ndim > 1 and len({part.shape[1] for part in parts}) > 1:
            longest = max(part.shape[1] for part in parts)
            parts = [_padded(part, longest) for part in parts]
        joined[name] = torch.cat(parts)
    return joined


def _masked(found: Tensors) -> Tensors:
    """The conditions of a row with a `text_mask`, and its text padded to a number of tokens that all of CUDA's attention kernels
    take with a bias."""
    count = found["text_rotary"].shape[1]
    length = count + -(count + found[MARK].shape[1]) % _BIASED_MULTIPLE
    found = found | {"text_mask": torch.ones(1, count, dtype=torch.bool)}
    return found | {name: _padded(found[name], length) for name in ("encoder_hidden_states", "text_rotary", "text_mask")}


def _padded(part: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat([part, part.new_zeros(part.shape[0], length - part.shape[1], *part.shape[2:])], dim=1)


def filled(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens [B, N, ...] filled with zeros up to a multiple of Z_MULTIPLE."""
    return _padded(tokens, tokens.shape[1] + -tokens.shape[1] % rotary.Z_MULTIPLE)


def patches(latents: torch.Tensor) -> torch.Tensor:
    """The tokens [N, 4C] of latents [C, 1, h, w], two by two."""
    channels, _, height, width = latents.shape
    grid = latents.view(channels, height // 2, 2, width // 2, 2).permute(1, 3, 2, 4, 0)
    return grid.reshape(-1, 4 * channels)


def unpatched(tokens: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The inverse of `patches` for latents of that shape, [C, 1, h, w]; tokens after the image's are dropped."""
    channels, _, height, width = shape
    grid = tokens[: height * width // 4].view(height // 2, width // 2, 2, 2, channels)
    return grid.permute(4, 0, 2, 1, 3).reshape(channels, 1, height, width)
