"""The transformers of Stable Diffusion 3, Flux, Chroma, FLUX.2, LongCat, Qwen-Image and Z-Image as graphs of batched tokens.

Traced as they are, these classes become graphs of one size and one row, or none at all: they take positions without a batch axis,
sizes as Python numbers, or lists, and turn them into rotary tables by complex numbers. Here their blocks are called in the order
of diffusers' `forward`, with rotary tables as inputs, one row for each image (`runtime/onnx/token_graphs.py` has the contract and
makes the tables). The attention layers' processors are exchanged for the time of a call.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from img2img_server.runtime.common import rotary
from img2img_server.runtime.common.rotary import Positions, Size
from img2img_server.runtime.onnx import token_graphs
from img2img_server.runtime.onnx.token_graphs import MARK, PLACES

from img2img_export.convert.graph_kinds import MASKED, Axes, GraphKind
from img2img_export.convert.parts import Part, Tensors

_OUTPUT = "out_hidden_states"


class Layout(NamedTuple):
    """The tokens of a row: of its text, and of its image and references, each a (height, width)."""

    text: int
    sizes: tuple[Size, ...]


class _Where(NamedTuple):
    """The rotary tables [B, S, head / 2] of a sequence, and the bias [B, 1, 1, S] of its scores, if any token is masked."""

    cos: torch.Tensor
    sin: torch.Tensor
    bias: torch.Tensor | None = None


class TokenKind(GraphKind):
    """A transformer as a graph of tokens. `graph` makes the inputs of calls of diffusers' class."""

    EXACT = ("timestep", "guidance", "text_rotary", MARK)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.graph = token_graphs.GRAPHS[config["_class_name"]](config)

    @property
    def inputs(self) -> Axes:
        """Tokens, timesteps [B], rotary tables, and what else the family needs."""
        image, text = {0: "batch_size", 1: "image_tokens"}, {0: "batch_size", 1: "text_tokens"}
        known: Axes = {"hidden_states": image, "encoder_hidden_states": text, "timestep": {0: "batch_size"}}
        known |= {"text_rotary": text, MARK: image}
        places = {"image": image, "text": text, "row": {0: "batch_size"}}
        return known | {name: places[place] for name, place in self._more().items()}

    @property
    def outputs(self) -> Axes:
        """The prediction for all image tokens, those of references among them."""
        return {_OUTPUT: {0: "batch_size", 1: "image_tokens"}}

    def call(self, model: Any, inputs: Tensors) -> Tensors:
        """Runs diffusers' `model` on the graph's inputs."""
        return {_OUTPUT: self._denoise(model, **inputs)}

    def reference(self, model: Any, call: dict[str, Any]) -> torch.Tensor:
        """The tokens [N, C] that diffusers' own `forward` returns for a call of one row."""
        found: torch.Tensor = model(**call, return_dict=False)[0][0]
        return found

    def example(self, layout: Layout, timestep: float, generator: torch.Generator) -> dict[str, Any]:
        """A call of diffusers' class with a row of random tokens."""
        raise NotImplementedError

    def _more(self) -> dict[str, str]:
        """The inputs that only this family has, each with "image", "text" or "row": what its second axis counts."""
        return {}

    def _denoise(self, model: Any, **inputs: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class FluxKind(TokenKind):
    """Flux, also Kontext, Fill, Depth and Canny."""

    _positions: Callable[[int, Sequence[Size]], tuple[Positions, Positions]] = staticmethod(rotary.flux_positions)

    def _more(self) -> dict[str, str]:
        return {"pooled_projections": "row"} | self._guidance()

    def _guidance(self) -> dict[str, str]:
        return {"guidance": "row"} if self._config.get("guidance_embeds") else {}

    def example(self, layout: Layout, timestep: float, generator: torch.Generator) -> dict[str, Any]:
        """A call of diffusers' class with a row of random tokens."""
        text, image = (torch.from_numpy(part) for part in self._positions(layout.text, layout.sizes))
        call: dict[str, Any] = {
            "hidden_states": torch.randn(1, len(image), self._config["in_channels"], generator=generator),
            "encoder_hidden_states": torch.randn(1, layout.text, self._config["joint_attention_dim"], generator=generator),
            "timestep": torch.tensor([timestep]),
            "txt_ids": text,
            "img_ids": image,
        }
        if "pooled_projections" in self._more():
            call["pooled_projections"] = torch.randn(1, self._config["pooled_projection_dim"], generator=generator)
        return call | ({"guidance": torch.tensor([1 + 4 * timestep])} if self._guidance() else {})

    def _denoise(self, model: Any, **inputs: torch.Tensor) -> torch.Tensor:
        with flux_arguments(model, inputs) as arguments:
            found: torch.Tensor = model(**arguments, return_dict=False)[0]
        return found


class ChromaKind(FluxKind):
    """Chroma, whose pipeline adds a mask of ones and zeros to the scores: between tokens of ones they are greater by one. So no
    token is hidden, and padding has an effect."""

    def _more(self) -> dict[str, str]:
        return {"prompt_mask": "text"}

    def example(self, layout: Layout, timestep: float, generator: torch.Generator) -> dict[str, Any]:
        """A call of diffusers' class with a row of random tokens, a third of whose text is padding."""
        call = super().example(layout, timestep, generator)
        mask = torch.ones(1, layout.text + call["hidden_states"].shape[1])
        mask[:, layout.text - layout.text // 3 : layout.text] = 0
        return call | {"attention_mask": mask}

    def _denoise(self, model: Any, **inputs: torch.Tensor) -> torch.Tensor:
        image = torch.ones_like(inputs["hidden_states"][..., 0])
        mask = torch.cat([inputs["prompt_mask"].to(image.dtype), image], dim=1)
        with flux_arguments(model, inputs) as arguments:
            found: torch.Tensor = model(**arguments, attention_mask=mask, return_dict=False)[0]
        return found


class LongCatKind(FluxKind):
    """LongCat-Image-Edit."""

    _positions = staticmethod(rotary.longcat_positions)

    def _more(self) -> dict[str, str]:
        return {"text_mask": "text"}


class Flux2Kind(FluxKind):
    """FLUX.2 and klein."""

    _positions = staticmethod(rotary.flux_2_positions)

    def _more(self) -> dict[str, str]:
        return self._guidance()

    def _denoise(self, model: Any, **inputs: torch.Tensor) -> torch.Tensor:
        where, dtype = _where(inputs), inputs["hidden_states"].dtype
        # Not the embedding's own forward, which has the timestep itself in the weights' precision.
        embedding, embedded = model.time_guidance_embed, []
        for name, embedder in (("timestep", "timestep_embedder"), ("guidance", "guidance_embedder")):
            if name in inputs:
                embedded.append(getattr(embedding, embedder)(embedding.time_proj(inputs[name] * 1000).to(dtype)))
        condition = sum(embedded[1:], embedded[0])
        modulations = model.double_stream_modulation_img(condition), model.double_stream_modulation_txt(condition)
        image, text = model.x_embedder(inputs["hidden_states"]), model.context_embedder(inputs["encoder_hidden_states"])
        with _processors(model.transformer_blocks, _Joint()):
            for block in model.transformer_blocks:
                text, image = block(image, text, *modulations, where)
        states, modulation = torch.cat([text, image], 1), model.single_stream_modulation(condition)
        with _processors(model.single_transformer_blocks, _Parallel()):
            for block in model.single_transformer_blocks:
                states = block(states, None, modulation, where)
        found: torch.Tensor = model.proj_out(model.norm_out(states[:, text.shape[1] :], condition))
        return found


class QwenKind(TokenKind):
    """Qwen-Image and its edit models."""

    def _more(self) -> dict[str, str]:
        return {"text_mask": "text"} | ({"is_reference": "image"} if self._config.get("zero_cond_t") else {})

    def example(self, layout: Layout, timestep: float, generator: torch.Generator) -> dict[str, Any]:
        """A call of diffusers' class with a row of random tokens."""
        count = sum(height * width for height, width in layout.sizes)
        return {
            "hidden_states": torch.randn(1, count, self._config["in_channels"], generator=generator),
            "encoder_hidden_states": torch.randn(1, layout.text, self._config["joint_attention_dim"], generator=generator),
            "timestep": torch.tensor([timestep]),
            "img_shapes": [[(1, height, width) for height, width in layout.sizes]],
        }

    def _denoise(self, model: Any, **inputs: torch.Tensor) -> torch.Tensor:
        where, timestep, clean = _where(inputs), inputs["timestep"], inputs.get("is_reference")
        image = model.img_in(inputs["hidden_states"])
        text = model.txt_in(model.txt_norm(inputs["encoder_hidden_states"]))
        if clean is not None:
            timestep = torch.cat([timestep, timestep * 0])
        embedded = model.time_text_embed(timestep, image)
        with _processors(model.transformer_blocks, _Joint()):
            for block in model.transformer_blocks:
                text, image = block(image, text, None, embedded, where, modulate_index=clean)
        embedded = embedded if clean is None else embedded.chunk(2)[0]
        found: torch.Tensor = model.proj_out(model.norm_out(image, embedded))
        return found


class ZKind(TokenKind):
    """Z-Image."""

    _PATCH = "2-1"

    def _more(self) -> dict[str, str]:
        return {"text_mask": "text", "text_real": "text", "image_real": "image"}

    def reference(self, model: Any, call: dict[str, Any]) -> torch.Tensor:
        """The tokens [N, C] that diffusers' own `forward` returns for a call of one row."""
        return token_graphs.patches(super().reference(model, call))

    def example(self, layout: Layout, timestep: float, generator: torch.Generator) -> dict[str, Any]:
        """A call of diffusers' class with a row of random tokens."""
        height, width = layout.sizes[0]
        return {
            "x": [torch.randn(self._config["in_channels"], 1, 2 * height, 2 * width, generator=generator)],
            "t": torch.tensor([timestep]),
            "cap_feats": [torch.randn(layout.text, self._config["cap_feat_dim"], generator=generator)],
        }

    def _denoise(self, model: Any, **inputs: torch.Tensor) -> torch.Tensor:
        text_real, image_real, count = inputs["text_real"], inputs["image_real"], inputs["encoder_hidden_states"].shape[1]
        where = _where(inputs)
        assert where.bias is not None
        text_where = _Where(where.cos[:, :count], where.sin[:, :count], where.bias[..., :count])
        image_where = _Where(where.cos[:, count:], where.sin[:, count:])
        embedded = model.t_embedder(inputs["timestep"] * model.t_scale).to(inputs["hidden_states"].dtype)
        image = model.all_x_embedder[self._PATCH](inputs["hidden_states"])
        text = model.cap_embedder(inputs["encoder_hidden_states"])
        image = torch.where(image_real[..., None], image, model.x_pad_token)
        text = torch.where(text_real[..., None], text, model.cap_pad_token)
        with _processors([*model.noise_refiner, *model.context_refiner, *model.layers], _Single()):
            for block in model.noise_refiner:
                image = block(image, None, image_where, embedded)
            for block in model.context_refiner:
                text = block(text, None, text_where)
            states = torch.cat([text, image], 1)
            for block in model.layers:
                states = block(states, None, where, embedded)
        found: torch.Tensor = model.all_final_layer[self._PATCH](states[:, count:], embedded)
        return found


class SD3Kind(TokenKind):
    """Stable Diffusion 3, whose positions are a table of embeddings."""

    @property
    def inputs(self) -> Axes:
        """Tokens, text [B, T, D], pooled text [B, P], timesteps [B], and the tokens' places."""
        image, row = {0: "batch_size", 1: "image_tokens"}, {0: "batch_size"}
        text = {0: "batch_size", 1: "text_tokens"}
        known: Axes = {"hidden_states": image, "encoder_hidden_states": text, "pooled_projections": row}
        return known | {"timestep": row, PLACES: image}

    def reference(self, model: Any, call: dict[str, Any]) -> torch.Tensor:
        """The tokens [N, C] that diffusers' own `forward` returns for a call of one row."""
        return token_graphs.patches(super().reference(model, call)[:, None])

    def example(self, layout: Layout, timestep: float, generator: torch.Generator) -> dict[str, Any]:
        """A call of diffusers' class with a row of random latents."""
        (height, width), config = layout.sizes[0], self._config
        return {
            "hidden_states": torch.randn(1, config["in_channels"], 2 * height, 2 * width, generator=generator),
            "encoder_hidden_states": torch.randn(1, layout.text, config["joint_attention_dim"], generator=generator),
            "pooled_projections": torch.randn(1, config["pooled_projection_dim"], generator=generator),
            "timestep": torch.tensor([1000 * timestep]),
        }

    def _denoise(self, model: Any, **inputs: torch.Tensor) -> torch.Tensor:
        places = inputs[PLACES]
        # The patches lie in one line, of which the convolution makes a token each.
        line = inputs["hidden_states"].unflatten(2, (2, 2, -1)).permute(0, 4, 2, 1, 3).flatten(3)  # type: ignore[no-untyped-call]
        # Not of the table without its first axis, which would be a second table in memory.
        embedded = model.pos_embed.pos_embed.index_select(1, places.flatten()).reshape(*places.shape, -1)
        with patch.object(model.pos_embed, "cropped_pos_embed", lambda *_: embedded):
            image = model.pos_embed(line)
        condition = model.time_text_embed(inputs["timestep"], inputs["pooled_projections"])
        text = model.context_embedder(inputs["encoder_hidden_states"])
        for block in model.transformer_blocks:
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=condition)
        found: torch.Tensor = model.proj_out(model.norm_out(image, condition))
        return found


KINDS: dict[str, type[TokenKind]] = {
    "SD3Transformer2DModel": SD3Kind,
    "FluxTransformer2DModel": FluxKind,
    "ChromaTransformer2DModel": ChromaKind,
    "Flux2Transformer2DModel": Flux2Kind,
    "LongCatImageTransformer2DModel": LongCatKind,
    "QwenImageTransformer2DModel": QwenKind,
    "ZImageTransformer2DModel": ZKind,
}
"""The kinds by module class."""


def token_part(name: str, module: Any) -> tuple[Part, TokenKind]:
    """Describes the graph of a transformer in KINDS."""
    kind = KINDS[type(module).__name__](module.config)
    return Part(name, name, kind.inputs, kind.outputs, kind.call, kind), kind


@contextlib.contextmanager
def flux_arguments(model: Any, inputs: Tensors) -> Iterator[dict[str, Any]]:
    """The arguments of a call of Flux's transformer, or of a ControlNet of it, for inputs of its graph, of which other names are
    ignored. Within it, the module reads the inputs' rotary tables and exact timesteps: diffusers rounds timestep and guidance to
    the weights' type before it takes their sines, which are then of angles up to 2 radians off."""
    embedding = model.time_embed if hasattr(model, "time_embed") else model.time_text_embed
    where, embed, guidance = _where(inputs), embedding.forward, inputs.get("guidance")
    if getattr(model, "union", False):  # its kind of image is a token before the text
        where = _Where(*(torch.cat([table[:, :1], table], 1) for table in (where.cos, where.sin)))
    exact = [inputs["timestep"] * 1000, *([] if guidance is None else [guidance * 1000])]

    def embed_exactly(*rounded: Any) -> torch.Tensor:
        embedded: torch.Tensor = embed(*exact, *rounded[len(exact) :])
        return embedded.to(rounded[0].dtype)

    with (
        patch.object(model.pos_embed, "forward", lambda _: where),
        patch.object(embedding, "forward", embed_exactly),
        _processors(model.transformer_blocks, _Joint()),
        _processors(model.single_transformer_blocks, _Single()),
    ):
        names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance")
        unread = torch.zeros(1, 3)
        yield {name: inputs[name] for name in names if name in inputs} | {"txt_ids": unread, "img_ids": unread}


def _where(inputs: Tensors) -> _Where:
    """The rotary tables and mask of the text's tokens, followed by the image's. The bias is in the weights' type: torch would
    export a mask in fp32, and the products after it."""
    tables = torch.cat([inputs["text_rotary"], inputs[MARK]], dim=1)
    bias = None
    if "text_mask" in inputs:
        image = inputs["hidden_states"]
        masked = (inputs["text_mask"].to(image.dtype) - 1) * MASKED
        bias = torch.cat([masked, torch.zeros_like(image[..., 0])], dim=1)[:, None, None]
    return _Where(tables[:, :, 0], tables[:, :, 1], bias)


@contextlib.contextmanager
def _processors(blocks: Iterable[Any], processor: Any) -> Iterator[None]:
    """Exchanges the attention processors of `blocks` within it."""
    with contextlib.ExitStack() as stack:
        for block in blocks:
            attention = block.attention if hasattr(block, "attention") else block.attn
            stack.enter_context(patch.object(attention, "processor", processor))
        yield


def _rotate(states: torch.Tensor, where: _Where) -> torch.Tensor:
    first, second = states.float().unflatten(-1, (-1, 2)).unbind(-1)  # type: ignore[no-untyped-call]
    cos, sin = where.cos[:, :, None], where.sin[:, :, None]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2).to(states.dtype)


def _attend(
    attn: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, where: _Where, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of [B, S, heads, D] with rotated queries and keys: [B, S, heads * D]. `bias` is in place of that of `where`."""
    query, key, value = (part.transpose(1, 2) for part in (_rotate(query, where), _rotate(key, where), value))
    scale = (attn.inner_dim // attn.heads) ** -0.5
    bias = where.bias if bias is None else bias
    states = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    return states.transpose(1, 2).flatten(2)


# diffusers' blocks pass an argument only if the processor's signature has it; Flux's attention passes them by position.


class _Joint:
    """Text and image with weights of their own: the double blocks of Flux, FLUX.2 and Qwen-Image."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
        encoder_hidden_states_mask: None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        image = _projected(attn, hidden_states, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        added = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k
        text = _projected(attn, encoder_hidden_states, *added)
        query, key, value = (torch.cat(pair, 1) for pair in zip(text, image, strict=True))
        states = _attend(attn, query, key, value, image_rotary_emb, attention_mask)
        count = encoder_hidden_states.shape[1]
        return attn.to_out[0](states[:, count:]), attn.to_add_out(states[:, :count])


class _Single:
    """One stream: Flux' single blocks (`image_rotary_emb`), and all of Z-Image's (`freqs_cis`), which project the result."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
        freqs_cis: Any = None,
    ) -> torch.Tensor:
        parts = _projected(attn, hidden_states, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        states = _attend(attn, *parts, where=freqs_cis or image_rotary_emb, bias=attention_mask)
        return attn.to_out[0](states) if freqs_cis else states


class _Parallel:
    """FLUX.2's single blocks: one projection for attention and feed-forward."""

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, attention_mask: None = None, image_rotary_emb: Any = None
    ) -> torch.Tensor:
        sizes = [3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor]
        states, forward = attn.to_qkv_mlp_proj(hidden_states).split(sizes, -1)
        query, key, value = (part.unflatten(-1, (attn.heads, -1)) for part in states.chunk(3, -1))
        states = _attend(attn, attn.norm_q(query), attn.norm_k(key), value, image_rotary_emb)
        found: torch.Tensor = attn.to_out(torch.cat([states, attn.mlp_act_fn(forward)], -1))
        return found


def _projected(
    attn: Any, states: torch.Tensor, to_q: Any, to_k: Any, to_v: Any, norm_q: Any, norm_k: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value = (to(states).unflatten(-1, (attn.heads, -1)) for to in (to_q, to_k, to_v))
    return norm_q(query), norm_k(key), value
