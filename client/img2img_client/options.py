"""Converts a caller's arguments to the request message. Omitted options stay unset, so the server's defaults apply."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias, TypedDict, get_args

from img2img.v1 import image_to_image_pb2 as messages

from img2img_client.values import Asset, Control, ImageFormat, ImageInput, ImagePrompt, Level, ModelInfo, ModelReference

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Maximum bytes of one request message."""

ADDRESS_SCHEMES = ("data:", "asset:", "https://", "http://", "file://")
"""Prefixes of addresses. The server's settings control which of them it reads; "data:" and "asset:" always work."""

Fit: TypeAlias = int | Literal["native"]
"""How the result's size is derived from the source's, keeping the aspect ratio: the longest side in pixels, or "native" for the
area that the model was trained on."""


_BOUNDS = ("fidelity", "min_psnr_db", "min_ssim")


class TransformOptions(TypedDict, total=False):
    """The options of a transform, with diffusers' names. None and omitted options mean the server's default.

    `model` is a model's id on the server or a ModelReference. `strength` is in (0, 1], `guidance_scale` in 0..30, `width` and
    `height` are pixels, `fit` replaces both, `quality` is 1..100 for JPEG and WebP, and a `seed` of -1 means a random seed.
    `scheduler` is one of the ModelInfo's `schedulers`. A stream sends a preview every `preview_interval` steps. With `as_asset`,
    the server stores the images, and the result has their `asset_id` instead of their data. `loras` are LoRAs of the server, by
    id, with their scales. The server validates the values.

    `mask` is an image that says what to redraw: white is redrawn, black is kept; `mask_invert` swaps them, `mask_blur` softens
    its edges by so many pixels. The result has the source's pixels outside the mask, unless `mask_paste` is False.
    `reference_images` are more images to edit by, and `true_cfg_scale`, in 0..30, is guidance by `negative_prompt`, for models
    that take them: `ModelInfo.fields` says which options a model takes, with its defaults and bounds. `controls` are images that
    ControlNets of the server read, such as edges or a pose. `image_prompts` are images that image adapters of the server read
    beside the prompt.

    `fidelity` says how near the images must be to the exact ones, for speed: "exact" (the default), "high" (at least 35 dB) or
    "fast" (at least 30 dB). Or set `min_psnr_db`, in decibels, or `min_ssim`, in 0..1. `ModelInfo.speedups` says what a model
    offers.
    """

    model: str | ModelReference | None
    prompt: str | None
    negative_prompt: str | None
    strength: float | None
    num_inference_steps: int | None
    guidance_scale: float | None
    seed: int | None
    image_count: int | None
    width: int | None
    height: int | None
    fit: Fit | None
    format: ImageFormat | None
    quality: int | None
    scheduler: str | None
    preview_interval: int | None
    as_asset: bool | None
    mask: ImageInput | None
    mask_blur: float | None
    mask_invert: bool | None
    mask_paste: bool | None
    reference_images: "Sequence[ImageInput] | None"
    true_cfg_scale: float | None
    loras: "Mapping[str, float] | None"
    fidelity: Level | None
    min_psnr_db: float | None
    min_ssim: float | None
    controls: "Sequence[Control] | None"
    image_prompts: "Sequence[ImagePrompt] | None"


def taken_options(options: TransformOptions, models: Sequence[ModelInfo]) -> TransformOptions:
    """Drops the options that the model does not take, or not without another one, because the server would refuse them.

    For programs that use the same options for all models. `models` are the server's. Keeps all options if the model is not chosen
    by its id, or is not ready.
    """
    named = options.get("model")
    model_id = named.path if isinstance(named, ModelReference) else named
    default = [model for model in models if model.is_default or len(models) == 1] if named is None else []
    chosen = [model for model in models if model.id == model_id] or default
    fields = set(messages.TransformRequest.DESCRIPTOR.fields_by_name) - {"model"}
    given = {name for name, value in options.items() if value is not None}
    refused = [name for name in options if name in fields and chosen and not chosen[0].takes(name, given)]
    return {name: value for name, value in options.items() if name not in refused}  # type: ignore[return-value]


def build_request(image: ImageInput, options: TransformOptions) -> messages.TransformRequest:
    """Reads the image and builds the request message.

    Raises OSError if the file cannot be read, TypeError for an unknown option or type, ValueError for a number or format that the
    contract cannot represent or a request above MAX_MESSAGE_BYTES.
    """
    unknown = sorted(options.keys() - TransformOptions.__annotations__.keys())
    if unknown:
        raise TypeError(f"unknown option {unknown[0]!r}; known: {', '.join(TransformOptions.__annotations__)}")
    mask = options.get("mask")
    request = messages.TransformRequest(
        model=model_message(options.get("model")),
        prompt=options.get("prompt"),
        negative_prompt=options.get("negative_prompt"),
        image=_image_message(image),
        strength=options.get("strength"),
        num_inference_steps=options.get("num_inference_steps"),
        guidance_scale=options.get("guidance_scale"),
        seed=options.get("seed"),
        image_count=options.get("image_count"),
        output=_output_message(options),
        width=options.get("width"),
        height=options.get("height"),
        fit=_fit_message(options.get("fit")),
        scheduler=options.get("scheduler"),
        preview_interval=options.get("preview_interval"),
        mask=None if mask is None else _image_message(mask, "mask"),
        mask_blur=options.get("mask_blur"),
        mask_invert=options.get("mask_invert"),
        mask_paste=options.get("mask_paste"),
        reference_images=_image_messages(options.get("reference_images") or (), "reference_images"),
        true_cfg_scale=options.get("true_cfg_scale"),
        loras=[messages.Lora(id=name, scale=scale) for name, scale in (options.get("loras") or {}).items()],
        fidelity=_fidelity_message(options),
        controls=[
            messages.Control(
                model=model_message(control.model),
                image=_image_message(control.image, "controls"),
                scale=control.scale,
                start=control.start,
                end=control.end,
                control_mode=control.control_mode,
            )
            for control in options.get("controls") or ()
        ],
        image_prompts=[
            messages.ImagePrompt(
                adapter=prompt.adapter,
                images=_image_messages(prompt.images, f"image_prompts[{index}].images"),
                scale=prompt.scale,
            )
            for index, prompt in enumerate(options.get("image_prompts") or ())
        ],
    )
    if request.ByteSize() > MAX_MESSAGE_BYTES:
        raise ValueError(
            f"the request has {request.ByteSize()} bytes, more than {MAX_MESSAGE_BYTES}: upload the image first, or send a"
            " smaller image"
        )
    return request


def model_message(model: str | ModelReference | None) -> messages.ModelReference | None:
    """The reference as a message; a str is a model's id."""
    if model is None:
        return None
    reference = ModelReference(path=model) if isinstance(model, str) else model
    return messages.ModelReference(
        repo_id=reference.repo_id or "",
        path=reference.path or "",
        variant=reference.variant or "",
        revision=reference.revision or "",
        allow_patterns=reference.allow_patterns,
        ignore_patterns=reference.ignore_patterns,
    )


def _image_message(image: ImageInput, name: str = "image") -> messages.ImageSource:
    if isinstance(image, Asset):
        return messages.ImageSource(asset_id=image.id)
    if isinstance(image, str) and image.startswith(ADDRESS_SCHEMES):
        return messages.ImageSource(uri=image)
    return messages.ImageSource(data=read_file(image, name))


def _image_messages(images: "Sequence[ImageInput]", name: str) -> list[messages.ImageSource]:
    if isinstance(images, str | bytes) or not isinstance(images, Iterable):
        raise TypeError(f"{name} must be a list of images, not a single image")
    return [_image_message(image, name) for image in images]


def read_file(image: ImageInput, name: str = "image") -> bytes:
    """The bytes of the image file. Raises OSError if it cannot be read, TypeError, naming the option `name`, for any other type
    (also an Asset), ValueError for a Pillow image in an unsupported mode."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    from PIL import Image

    if isinstance(image, Image.Image):
        from img2img_client.pillow import encode

        return encode(image)
    raise TypeError(f"{name} must be a path, bytes, a Pillow image, an Asset or an address, not {type(image).__name__}")


def _fit_message(fit: Fit | None) -> messages.Fit | None:
    if fit is None:
        return None
    if fit == "native":
        return messages.Fit(native_area=messages.NativeArea())
    if isinstance(fit, bool) or not isinstance(fit, int):
        raise ValueError(f"fit must be 'native' or the longest side in pixels, not {fit!r}")
    return messages.Fit(longest_side=fit)


def _fidelity_message(options: TransformOptions) -> messages.Fidelity | None:
    bounds = {name: options.get(name) for name in _BOUNDS if options.get(name) is not None}
    if len(bounds) > 1:
        raise ValueError(f"{' and '.join(bounds)} are both a bound: set only one of them")
    if (level := bounds.get("fidelity")) is not None:
        if level not in get_args(Level):
            raise ValueError(f"fidelity must be one of {', '.join(get_args(Level))}, not {level!r}")
        return messages.Fidelity(level=messages.FidelityLevel.Value(f"FIDELITY_LEVEL_{str(level).upper()}"))
    return messages.Fidelity(**bounds) if bounds else None  # type: ignore[arg-type]


def _output_message(options: TransformOptions) -> messages.OutputOptions | None:
    image_format, quality, as_asset = options.get("format"), options.get("quality"), options.get("as_asset")
    if image_format is None and quality is None and as_asset is None:
        return None
    number = messages.OUTPUT_FORMAT_UNSPECIFIED
    if image_format is not None:
        if image_format not in get_args(ImageFormat):
            raise ValueError(f"format must be one of {', '.join(get_args(ImageFormat))}, not {image_format!r}")
        number = messages.OutputFormat.Value(f"OUTPUT_FORMAT_{image_format.upper()}")
    return messages.OutputOptions(format=number, quality=quality, as_asset=bool(as_asset))
