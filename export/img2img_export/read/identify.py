"""Identifies a safetensors file that is not a complete model by its tensors, and says what to do with it.

A complete model in one file has a denoiser, a VAE and text encoders. LoRAs, embeddings, ControlNets, upscalers and single
components have the same file suffix.
"""

import re
from collections.abc import Iterable, Mapping

from img2img_export.errors import ExportError
from img2img_export.read.weights_file import TensorInfo

PIX2PIX = "StableDiffusionInstructPix2PixPipeline"

_BASE = "export its base model"
_ADAPTERS = (
    (
        r"(.*\.)?(lora_(up|down|A|B)\b.*|lora\.(up|down)\..*)|lora_(unet|te\d?|transformer)_.*|(.*\.)?(hada|lokr)_w\d.*|.*\.(oft|dora)_\w+.*",
        "a LoRA, not a model",
        "export its base model with `--lora {path}`",
    ),
    (
        r"(control_model|controlnet_\w+|input_hint_block|control_(all_x_embedder|layers|noise_refiner))\..*|lllite_.*",
        "a ControlNet, not a model",
        "export its directory in diffusers' layout (a config.json and diffusion_pytorch_model.safetensors)",
    ),
    (
        r"(image_proj|ip_adapter)\..*|proj\.(0|2|3)\..*|ip_adapter_.*",
        "an IP-Adapter, not a model",
        f"img2img does not support it; {_BASE} without it",
    ),
    (
        r"(adapter\.)?body\.\d+\.(block\d|in_conv|resnets\.\d+\.block\d|down_opt).*",
        "a T2I-Adapter, not a model",
        f"img2img does not support it; {_BASE} without it",
    ),
    (
        r"(.*\.)?motion_modules\..*",
        "a motion module of AnimateDiff, not a model",
        f"img2img generates single images; {_BASE} without it",
    ),
    (
        r"(model\.\d+\.sub\..*|RRDB_trunk\..*|trunk_conv\..*|body\.\d+\.rdb\d\..*|conv_first\..*|layers\.\d+\.residual_group\..*)",
        "an upscaler (such as ESRGAN), not a diffusion model",
        "img2img does not support it; choose a diffusion model",
    ),
)
"""Patterns of tensor names, the kind of file, and advice. More specific patterns come first."""

_EMBEDDING = re.compile(r"emb_params|string_to_param(\..*)?|clip_[lg]|t5xxl|<.*>")
_TRANSFORMER = (
    r"double_blocks|single_blocks|joint_blocks|transformer_blocks|single_transformer_blocks|blocks|layers|noise_refiner"
)
_DENOISER = re.compile(
    rf"(model\.)?diffusion_model\..*|(input_blocks|middle_block|output_blocks|down_blocks|up_blocks|mid_block|{_TRANSFORMER})\..*"
)
_VAE = re.compile(
    r"(first_stage_model|vae)\..*|(encoder|decoder)\.(conv_in|conv_out|down|up|mid|down_blocks|up_blocks|mid_block)\b.*"
    r"|(encoder|decoder)\.layers\.\d+\.(conv\.|skip\.|weight|bias).*"
)
_TEXT = re.compile(
    r"(cond_stage_model|conditioner|text_encoders?(_\d)?)\..*|(text_model|transformer\.resblocks|vision_model)\..*|token_embedding\.weight"
    r"|shared\.weight|encoder\.(block|layers)\.\d+\..*|model\.embed_tokens\.weight|embeddings\.(token|position)_embedding\..*"
)
_PARTS = (("a VAE", _VAE), ("text encoders", _TEXT), ("a denoiser (UNet or transformer)", _DENOISER))
"""The parts of a complete model. A tensor belongs to the first pattern that matches its name."""

INPAINTING: Mapping[str, str] = {
    "StableDiffusionInpaintPipeline": "StableDiffusionPipeline",
    "StableDiffusionXLInpaintPipeline": "StableDiffusionXLPipeline",
}
"""Classes of inpainting models, whose UNets also see the mask and the masked image, and of the models they were made from."""

FLUX_FILL = "FluxFillPipeline"
"""The class of Flux Fill, whose transformer also sees the mask and the masked image."""

FLUX_CONTROL = ("FluxControlPipeline", "FluxControlImg2ImgPipeline", "FluxControlInpaintPipeline")
"""The classes of Flux Depth and Canny, whose transformer also sees a control image."""

CHANNELS: Mapping[int, str] = {
    5: "a depth-to-image UNet, which takes a depth map",
    7: "an upscaler's UNet, which takes a small image",
    8: "an InstructPix2Pix UNet, which takes the source image",
    9: "an inpainting UNet, which takes a mask and the masked image",
}
"""Kinds of UNets with 4-channel latents, by input channels."""
FLUX_CHANNELS: Mapping[int, str] = {
    128: "a Flux Depth or Canny model, which takes a control image",
    384: "a Flux Fill, an inpainting model, which takes a mask",
}
INPUTS = ("model.diffusion_model.input_blocks.0.0.weight", "input_blocks.0.0.weight", "conv_in.weight")
"""Names of a UNet's first weight [out, in, 3, 3]."""
FLUX_INPUTS = ("model.diffusion_model.img_in.weight", "img_in.weight")


def refuse_part(path: object, tensors: Mapping[str, TensorInfo]) -> None:
    """Raises ExportError unless a file with these tensors is a complete model."""
    for pattern, what, advice in _ADAPTERS:
        compiled = re.compile(pattern)
        if (found := sum(compiled.fullmatch(name) is not None for name in tensors)) and _is_most(found, tensors):
            raise ExportError(f"{path} is {what}: {advice.format(path=path)}")
    found_parts = _parts(tensors)
    if tensors and all(_EMBEDDING.fullmatch(name) for name in tensors) and not found_parts - {"text encoders"}:
        raise ExportError(
            f"{path} is a textual inversion embedding, not a model: img2img does not support it; {_BASE} without it"
        )
    missing = [what for what, _ in _PARTS if what not in found_parts]
    if not found_parts:
        names = ", ".join(sorted(tensors)[:3]) or "none"
        raise ExportError(f"{path} is not a diffusion model that img2img supports: its tensors are {names} and similar")
    if missing:
        raise ExportError(
            f"{path} holds {' and '.join(sorted(found_parts))} only, and lacks {' and '.join(missing)}: choose a complete model. "
            "To use it as a component, load a model with diffusers, replace the component, save it with save_pretrained() and "
            "export that directory"
        )


def refuse_channels(path: object, tensors: Mapping[str, TensorInfo], pipeline_class: str) -> None:
    """Raises ExportError if the denoiser in a single file takes more input channels than `pipeline_class` provides."""
    for names, kinds in ((INPUTS, CHANNELS), (FLUX_INPUTS, FLUX_CHANNELS)):
        for name in names:
            shape = tensors[name].shape if name in tensors else ()
            taken = shape[1] if len(shape) > 1 else 0
            has_own = (
                (taken == 8 and pipeline_class == PIX2PIX)
                or (taken == 9 and pipeline_class in INPAINTING)
                or (taken == 384 and pipeline_class == FLUX_FILL)
                or (taken == 128 and pipeline_class in FLUX_CONTROL)
            )
            if taken in kinds and not has_own:
                refuse_kind(path, kinds[taken], taken)


def refuse_kind(path: object, what: str, channels: int) -> None:
    """Raises the ExportError for a denoiser with extra inputs. InstructPix2Pix, inpainting models and Flux Depth and Canny are
    supported by their own pipeline classes."""
    advice = "img2img supports models whose inputs are an image and a text: export its base model"
    if channels == 8:
        advice = f"its model_index.json (for a single file, that of --config) must name {PIX2PIX}"
    if channels == 128:
        advice = f"its model_index.json (for a single file, that of --config) must name {FLUX_CONTROL[0]}"
    if channels == 384:
        advice = f"its model_index.json (for a single file, that of --config) must name {FLUX_FILL}"
    if channels == 9:
        advice = f"its model_index.json (for a single file, that of --config) must name {' or '.join(INPAINTING)}"
    raise ExportError(f"{path} is {what} ({channels} input channels): {advice}")


def _is_most(found: int, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether the file is mainly an adapter, not a complete model with some adapter tensors (refused elsewhere)."""
    return found * 2 >= len(tensors) or not {"a VAE", "text encoders"} <= _parts(tensors)


def _parts(names: Iterable[str]) -> set[str]:
    found = set()
    for name in names:
        found |= {next(what for what, pattern in _PARTS if pattern.fullmatch(name))} if _fits(name) else set()
    return found


def _fits(name: str) -> bool:
    return any(pattern.fullmatch(name) for _, pattern in _PARTS)
