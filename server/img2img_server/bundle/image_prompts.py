"""Image prompts (IP-Adapters) of UNets: the names and shapes of the control graph's inputs for them.

An IP-Adapter adds to each cross-attention that of its image tokens. Its keys and values depend on images only, so they are made
outside of the graph, for all layers, and are inputs: for each cross-attention in diffusers' order its keys, then its values, side
by side. Each adapter has a softmax of its own; its values include the scale. Standard library only: the exporter imports this
module, too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from img2img_server.bundle.files import add_layers

STATES, BIAS = "image_prompt_states", "image_prompt_bias"
"""The inputs of keys and values [rows, adapters, tokens, `states_width`], and of the bias of the tokens' scores [rows, adapters,
tokens]: 0 or `PADDING`. A row without image prompts has zeros in both, which add exactly 0."""
PADDING = -10_000.0
"""The bias of tokens that fill up a row's. Every precision can represent it, and its exponential is 0 in all."""
ADAPTERS, TOKENS = "image_adapters", "image_tokens"
"""Names of the inputs' variable axes."""
ADAPTER_COUNTS, TOKEN_COUNTS = (1, 2, 4), (4, 16, 32, 64, 128, 272)
"""The lengths that the axes of calls are padded to, so that few shapes occur. Rows without image prompts alone have one token."""

PROMPTS_ONLY = ("latent-consistency", "stable-diffusion-inpainting", "stable-diffusion-xl-inpainting")
"""The families whose control graph is for image prompts only: their requests have no ControlNets."""

_BLOCKS: dict[str | None, bool] = {
    **{"DownBlock2D": False, "UpBlock2D": False, "UNetMidBlock2D": False, None: False},
    **{"CrossAttnDownBlock2D": True, "CrossAttnUpBlock2D": True, "UNetMidBlock2DCrossAttn": True},
}
"""The blocks whose layers are known, and whether they have cross-attentions."""
_OTHERWISE = ("dual_cross_attention", "only_cross_attention", "mid_block_only_cross_attention", "encoder_hid_dim_type")
"""Settings that make a UNet's cross-attentions, or their inputs, unsuitable for IP-Adapters."""


def layer_widths(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The width of each cross-attention of a UNet with this config.json, in the order of diffusers' `unet.attn_processors`: that
    of `ip_adapter.1`, `ip_adapter.3` and so on in an IP-Adapter's file. Empty if the model takes no image prompts. Raises
    ValueError for more layers than any model has, or another error if the configuration is damaged."""
    if not _is_plain(config):
        return ()
    widths, blocks = config["block_out_channels"], len(config["down_block_types"])
    counts = _each(config["layers_per_block"], blocks)
    depths = _each(config.get("transformer_layers_per_block", 1), blocks)
    up_depths = config.get("reverse_transformer_layers_per_block") or depths[::-1]
    down = zip(config["down_block_types"], widths, counts, depths, strict=True)
    up = zip(config["up_block_types"], widths[::-1], (count + 1 for count in counts[::-1]), up_depths, strict=True)
    found: list[int] = []
    for kind, width, count, depth in (*down, *up, (_mid(config), widths[-1], 1, depths[-1])):
        if _BLOCKS[kind]:
            add_layers(found, width, depth * count if isinstance(depth, int) else sum(depth[:count]))
    return tuple(found)


def states_width(widths: Sequence[int]) -> int:
    """The last axis of `STATES` for cross-attentions of these widths."""
    return 2 * sum(widths)


def filled_up(count: int, counts: Sequence[int]) -> int:
    """The length that an axis with `count` entries is filled up to: the next of `counts`, or a multiple of the last."""
    return next((known for known in counts if count <= known), -(-count // counts[-1]) * counts[-1])


def _is_plain(config: Mapping[str, Any]) -> bool:
    """Whether all cross-attentions of a UNet are known, and such that IP-Adapters can be made for them."""
    return (
        config.get("_class_name") == "UNet2DConditionModel"
        and {*config["down_block_types"], *config["up_block_types"], _mid(config)} <= _BLOCKS.keys()
        and config.get("attention_type", "default") == "default"
        and isinstance(config["cross_attention_dim"], int)
        and not any(any(value) if isinstance(value := config.get(name), list | tuple) else value for name in _OTHERWISE)
    )


def _mid(config: Mapping[str, Any]) -> str | None:
    kind: str | None = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    return kind


def _each(value: Any, count: int) -> list[Any]:
    """A setting that is one number for all of `count` blocks or layers, or a list with a number for each."""
    return [value] * count if isinstance(value, int) else list(value)
