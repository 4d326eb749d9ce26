"""Translates ModelInferRequests (tensors and parameters) to TransformRequests, and responses back to ModelInferResponses."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from img2img.v1 import image_to_image_pb2 as pb
from PIL import Image
from tritonclient.grpc import service_pb2 as kserve_pb  # type: ignore[import-untyped]

from img2img_server.api.controls import controls_from
from img2img_server.api.fidelity import put_fidelity
from img2img_server.api.image_prompts import add_images, image_prompts_from
from img2img_server.api.kserve import tensors
from img2img_server.api.kserve.tensors import Input, Output, shown
from img2img_server.api.loras import loras_from
from img2img_server.errors import InvalidField, ModelNotFound, NotSupported
from img2img_server.sources.reading import begins_as_address
from img2img_server.support.fair_queue import FairThreads

_T = TypeVar("_T")
_KINDS = {
    "bool_param": "a bool",
    "int64_param": "an integer",
    "uint64_param": "an integer",
    "string_param": "a string",
    "double_param": "a number",
}


class Parameters:
    """Parameters by name. Each reader returns None for a missing parameter and raises InvalidField for one of another type."""

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self._parameters = parameters
        self._known: set[str] = set()

    def text(self, name: str) -> str | None:
        """Reads a string."""
        value: str | None = self._read(name, "a string", "string_param")
        return value

    def integer(self, name: str, bits: int) -> int | None:
        """Reads a signed integer of at most `bits` bits."""
        value: int | None = self._read(name, "an integer", "int64_param", "uint64_param")
        if value is not None and not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1):
            raise InvalidField(name, f"{value} needs more than {bits} bits")
        return value

    def number(self, name: str) -> float | None:
        """Reads a floating-point number or an integer."""
        value = self._read(name, "a number", "double_param", "int64_param", "uint64_param")
        return None if value is None else float(value)

    def text_or_integer(self, name: str) -> str | int | None:
        """Reads a string or an integer, which may also be given as a string."""
        value: str | int | None = self._read(name, "a string or an integer", "string_param", "int64_param", "uint64_param")
        return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value

    def truth(self, name: str) -> bool:
        """Reads a bool, False if it is missing."""
        return bool(self.switch(name))

    def switch(self, name: str) -> bool | None:
        """Reads a bool."""
        value: bool | None = self._read(name, "a bool", "bool_param")
        return value

    def one_of(self, name: str, choices: Mapping[str, _T]) -> _T | None:
        """Reads a key of `choices`, ignoring case, and returns its value."""
        word = self.text(name)
        if word is None:
            return None
        if word.lower() not in choices:
            raise InvalidField(name, f"{shown(word)} is not one of {', '.join(choices)}")
        return choices[word.lower()]

    def finish(self) -> None:
        """Raises InvalidField if there is a parameter that no reader has read."""
        for name in sorted(self._parameters):
            if name not in self._known:
                raise InvalidField("parameters", f"unknown parameter {shown(name)}; known are {', '.join(sorted(self._known))}")

    def _read(self, name: str, wanted: str, *kinds: str) -> Any:
        self._known.add(name)
        if name not in self._parameters:
            return None
        kind = self._parameters[name].WhichOneof("parameter_choice")
        if kind not in kinds:
            raise InvalidField(name, f"the parameter is {_KINDS.get(kind, 'empty')}, expected {wanted}")
        return getattr(self._parameters[name], kind)


VERSION = "1"
"""The version of every model: a changed bundle is a new model."""

SOURCES = (
    Input("image", ("BYTES",)),
    Input("image_uri", ("BYTES",)),
    Input("image_pixels", ("UINT8",), (-1, -1, 3)),
)
"""Inputs for the source image, of which a request contains exactly one."""
MASKS = (
    Input("mask", ("BYTES",)),
    Input("mask_uri", ("BYTES",)),
    Input("mask_pixels", ("UINT8",), (-1, -1)),
)
"""Inputs for the mask, of which a request contains at most one."""
REFERENCES = Input("reference_images", ("BYTES",), (-1,))
"""Image files or addresses, for models that take reference images."""
CONTROL_IMAGES = Input("control_images", ("BYTES",), (-1,))
"""Image files or addresses, for the ControlNets of the parameter `controls`, or without it for the model itself."""
PROMPT_IMAGES = Input("prompt_images", ("BYTES",), (-1,))
"""Image files or addresses, for the image adapters of the parameter `image_prompts`."""
SETTINGS = (
    Input("prompt", ("BYTES",)),
    Input("negative_prompt", ("BYTES",)),
    Input("strength", ("FP32", "FP64")),
    Input("guidance_scale", ("FP32", "FP64")),
    Input("true_cfg_scale", ("FP32", "FP64")),
    Input("num_inference_steps", ("INT64", "INT32")),
    Input("seed", ("INT64", "INT32")),
    Input("image_count", ("INT64", "INT32")),
    Input("mask_blur", ("FP32", "FP64")),
    Input("width", ("INT64", "INT32")),
    Input("height", ("INT64", "INT32")),
    Input("scheduler", ("BYTES",)),
)
"""Inputs named as their fields in TransformRequest. Each may be given as a parameter instead."""
IMAGES, SEED = Output("images", "BYTES"), Output("seed", "INT64")
INPUTS = (*SOURCES, *MASKS, REFERENCES, CONTROL_IMAGES, PROMPT_IMAGES, *SETTINGS)
FIELD_OF = {
    **{one.name: "image" for one in SOURCES},
    **{one.name: "mask" for one in MASKS},
    CONTROL_IMAGES.name: "controls",
    PROMPT_IMAGES.name: "image_prompts",
}
"""The fields of TransformRequest that inputs of other names are for."""
_IMAGES_OF = {"controls": CONTROL_IMAGES, "image_prompts": PROMPT_IMAGES}
"""The inputs with the images of fields whose other values are parameters."""
OUTPUTS = (IMAGES, SEED)
STEP, STEP_COUNT, PREVIEW = Output("step", "INT64", (1,)), Output("step_count", "INT64", (1,)), Output("preview", "BYTES", (1,))
PROGRESS = (STEP, STEP_COUNT, PREVIEW)
"""Outputs of progress responses, in streams that request progress."""

_NATIVE = "native"
_FIELDS = {
    "fit.longest_side": "fit",
    "output.format": "output_format",
    "output.quality": "quality",
    "model": "model_name",
    "id": "model_name",
}
"""KServe's names of fields in TransformRequest and in ModelService's messages."""
_TIMINGS = tuple(field.name for field in pb.Timings.DESCRIPTOR.fields)


@dataclass(frozen=True, slots=True)
class Task:
    """A translated ModelInferRequest.

    `outputs` are the requested ones, in order. With `progress` each step is sent. It times out after `seconds`, None for never.
    `sources` are the names of the inputs by the fields `image` and `mask`; if that of the image was `batched`, the outputs have a
    batch dimension too.
    """

    message: pb.TransformRequest
    id: str
    outputs: tuple[Output, ...]
    progress: bool
    seconds: float | None
    sources: Mapping[str, str]
    batched: bool


async def read(request: Any, threads: FairThreads) -> Task:
    """Translates a request, with slow parts on `threads`. Checks types and shapes; the parser checks values.

    Raises InvalidField, NotSupported or ModelNotFound.
    """
    check_name(request.model_name)
    check_version(request.model_name, request.model_version)
    outputs = _outputs(request)
    # On a thread: a large image takes milliseconds, or a second if its values are typed contents.
    given = await threads.run(tensors.read, request, INPUTS)
    parameters = Parameters(request.parameters)
    message = pb.TransformRequest(model=pb.ModelReference(path=request.model_name))
    for setting in SETTINGS:
        _set(message, setting.name, given, parameters)
    message.output.format = parameters.one_of("output_format", _formats()) or pb.OUTPUT_FORMAT_UNSPECIFIED
    if (quality := parameters.integer("quality", 32)) is not None:
        message.output.quality = quality
    _set_fit(message, parameters.text_or_integer("fit"))
    _set_loras(message, parameters.text("loras"))
    if (fidelity := parameters.text("fidelity")) is not None:
        put_fidelity(message, fidelity)
    _set_controls(message, parameters.text("controls"), given)
    _set_image_prompts(message, parameters.text("image_prompts"), given)
    message.preview_interval = parameters.integer("preview_interval", 32) or 0
    progress = parameters.truth("progress") or message.preview_interval > 0
    for name in ("mask_invert", "mask_paste"):
        if (switch := parameters.switch(name)) is not None:
            setattr(message, name, switch)
    uris = {field: parameters.text(f"{field}_uri") for field in ("image", "mask")}
    _set_references(message, given)
    seconds = _seconds(parameters)
    parameters.finish()
    source = await _set_source(message.image, "image", SOURCES, given, uris["image"], threads)
    if source is None:
        raise InvalidField("image", f"exactly one of the inputs {_names(SOURCES)} is required, but none is given")
    mask = await _set_source(message.mask, "mask", MASKS, given, uris["mask"], threads)
    sources = {"image": source} | ({} if mask is None else {"mask": mask})
    return Task(message, request.id, outputs, progress, seconds, sources, source in given and given[source].batched)


def check_name(name: str) -> None:
    """Raises InvalidField if the model's name is empty."""
    if not name:
        raise InvalidField("model_name", "model_name is empty: use a name that RepositoryIndex lists")


def check_version(name: str, version: str) -> None:
    """Raises ModelNotFound for any version except "" and VERSION."""
    if version not in ("", VERSION):
        raise ModelNotFound(f"model {tensors.shown(name)} has no version {tensors.shown(version)}: the only version is {VERSION}")


@contextmanager
def renamed(sources: Mapping[str, str] = MappingProxyType({})) -> Iterator[None]:
    """Renames the field of an InvalidField raised in the block to KServe's tensor, parameter or field; `sources` as in a Task."""
    try:
        yield
    except InvalidField as error:
        root, path = error.root, error.field
        if root in ("image", "mask"):
            field = sources.get(root, root)
        elif root in _IMAGES_OF:
            field = _IMAGES_OF[root].name if "].image" in path else root
        elif root in ("loras", "fidelity"):
            field = root
        else:  # elements of the tensor of reference images keep their number
            field = _FIELDS.get(path, path.partition(".")[0] if "[" in path else path)
        raise InvalidField(field, error.description) from None


def written(task: Task, answer: pb.TransformResponse) -> Any:
    """The ModelInferResponse of a finished transform."""
    response = kserve_pb.ModelInferResponse(model_name=answer.model_id, model_version=VERSION, id=task.id)
    for output in task.outputs:
        if output is IMAGES:
            tensors.write(response, output, [image.data for image in answer.images], task.batched)
        else:
            tensors.write(response, output, [image.seed for image in answer.images], task.batched)
    for name in _TIMINGS:
        response.parameters[name].double_param = getattr(answer.timings, name)
    if answer.warnings:
        warnings = [{"field": one.field, "code": one.code, "description": one.description} for one in answer.warnings]
        response.parameters["warnings"].string_param = json.dumps(warnings, ensure_ascii=False)
    if answer.HasField("speedup"):
        response.parameters["speedup"].string_param = answer.speedup.name
    response.parameters["engine"].string_param = answer.engine
    response.parameters["model_revision"].string_param = answer.model_revision
    return response


def written_progress(task: Task, progress: pb.Progress) -> Any:
    """The ModelInferResponse of a progress event."""
    response = kserve_pb.ModelInferResponse(model_name=task.message.model.path, model_version=VERSION, id=task.id)
    tensors.write(response, STEP, [progress.step], task.batched)
    tensors.write(response, STEP_COUNT, [progress.step_count], task.batched)
    if progress.HasField("preview"):
        tensors.write(response, PREVIEW, [progress.preview], task.batched)
    if progress.HasField("eta_seconds"):
        response.parameters["eta_seconds"].double_param = progress.eta_seconds
    return response


def _outputs(request: Any) -> tuple[Output, ...]:
    known, asked = {output.name: output for output in OUTPUTS}, list[Output]()
    for tensor in request.outputs:
        if tensor.name not in known:
            raise InvalidField("outputs", f"unknown output {tensors.shown(tensor.name)}; known are {', '.join(known)}")
        if known[tensor.name] in asked:
            raise InvalidField("outputs", f"'{tensor.name}' is requested more than once")
        for key in sorted(tensor.parameters):
            if key == "classification" or key.startswith("shared_memory"):
                raise NotSupported(f"{tensor.name}: {key} is not supported")
            raise InvalidField(tensor.name, f"unknown output parameter {tensors.shown(key)}")
        asked.append(known[tensor.name])
    return tuple(asked) or OUTPUTS


def _set(message: pb.TransformRequest, name: str, given: Mapping[str, tensors.Given], parameters: Parameters) -> None:
    """Sets a field of the message from the tensor of its name, or from the parameter if there is no tensor."""
    field = message.DESCRIPTOR.fields_by_name[name]
    value: Any
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        value = parameters.text(name)
    elif field.cpp_type == FieldDescriptor.CPPTYPE_DOUBLE:
        value = parameters.number(name)
    else:
        value = parameters.integer(name, 32 if field.cpp_type == FieldDescriptor.CPPTYPE_INT32 else 64)
    if name in given:
        value = given[name].value
        if isinstance(value, bytes):
            value = _text(name, value)
        elif field.cpp_type == FieldDescriptor.CPPTYPE_INT32 and not -(2**31) <= value < 2**31:
            raise InvalidField(name, f"{value} needs more than 32 bits")
    if value is not None:
        setattr(message, name, value)


def _set_fit(message: pb.TransformRequest, fit: str | int | None) -> None:
    if isinstance(fit, int):
        if not -(2**31) <= fit < 2**31:
            raise InvalidField("fit", f"{fit} needs more than 32 bits")
        message.fit.longest_side = fit
    elif fit is not None:
        if fit.lower() != _NATIVE:
            raise InvalidField("fit", f"{tensors.shown(fit)} is neither '{_NATIVE}' nor the longest side in pixels")
        message.fit.native_area.SetInParent()


def _set_loras(message: pb.TransformRequest, text: str | None) -> None:
    message.loras.extend(loras_from(text or ""))


def _set_controls(message: pb.TransformRequest, text: str | None, given: Mapping[str, tensors.Given]) -> None:
    images = _images(CONTROL_IMAGES, given)
    controls = [pb.Control() for _ in images] if text is None else controls_from(text)  # for the model itself, without names
    if len(images) != len(controls):
        raise InvalidField(
            CONTROL_IMAGES.name, f"there are {len(images)}, and the parameter controls names {len(controls)} ControlNets"
        )
    for control, image in zip(controls, images, strict=True):
        control.image.CopyFrom(image)
    message.controls.extend(controls)


def _set_image_prompts(message: pb.TransformRequest, text: str | None, given: Mapping[str, tensors.Given]) -> None:
    images = _images(PROMPT_IMAGES, given)
    message.image_prompts.extend(image_prompts_from(text or ""))
    add_images(message.image_prompts, images, PROMPT_IMAGES.name)


def _images(one: Input, given: Mapping[str, tensors.Given]) -> list[pb.ImageSource]:
    """The images of an input: files or addresses."""
    found = given.get(one.name)
    sources = []
    for data in found.value if found is not None and isinstance(found.value, tuple) else ():
        sources.append(pb.ImageSource())
        _set_image(sources[-1], one.name, data)
    return sources


async def _set_source(
    source: pb.ImageSource,
    field: str,
    inputs: Sequence[Input],
    given: Mapping[str, tensors.Given],
    uri: str | None,
    threads: FairThreads,
) -> str | None:
    """Sets the image in `field`, for which `inputs` are known. Returns the name of its input, None if there is none."""
    found = [one.name for one in inputs if one.name in given]
    if uri is not None and f"{field}_uri" not in found:
        found.append(f"{field}_uri")
    if not found:
        return None
    if len(found) > 1:
        raise InvalidField(field, f"only one of the inputs {_names(inputs)} is allowed, but {len(found)} are given")
    (name,) = found
    value = uri if name not in given else given[name].value
    if isinstance(value, np.ndarray):
        source.data = await threads.run(_file, value)
    elif name == field:
        assert isinstance(value, bytes), "a BYTES tensor holds bytes"
        source.data = value
    else:
        source.uri = value if isinstance(value, str) else _text(name, value)
    return name


def _names(inputs: Sequence[Input]) -> str:
    return ", ".join(one.name for one in inputs)


def _set_references(message: pb.TransformRequest, given: Mapping[str, tensors.Given]) -> None:
    message.reference_images.extend(_images(REFERENCES, given))


def _set_image(source: pb.ImageSource, name: str, data: bytes) -> None:
    """Sets an image of the input `name`: a file, or an address."""
    if begins_as_address(data):
        source.uri = _text(name, data)
    else:
        source.data = data


def _file(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """Encodes pixels, [height, width, 3] or gray [height, width], as BMP, which is lossless and cheap to write and to read."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "BMP")
    return file.getvalue()


def _text(name: str, value: Any) -> str:
    try:
        return str(value, "utf-8")
    except UnicodeDecodeError as error:
        raise InvalidField(name, f"the string is not valid UTF-8 at byte {error.start}") from None


def _seconds(parameters: Parameters) -> float | None:
    """Reads Triton's `timeout`, microseconds or 0 for none. `priority` is accepted and ignored: clients are scheduled fairly."""
    parameters.integer("priority", 65)  # an unsigned integer of 64 bits
    parameters.truth("triton_enable_empty_final_response")  # not needed: final responses are marked
    microseconds = parameters.integer("timeout", 64)
    if microseconds is not None and microseconds < 0:
        raise InvalidField("timeout", f"{microseconds} is negative: set microseconds, or 0 for no timeout")
    return microseconds / 1e6 if microseconds else None


def _formats() -> dict[str, Any]:
    formats = pb.OutputFormat.DESCRIPTOR.values
    return {value.name.removeprefix("OUTPUT_FORMAT_").lower(): value.number for value in formats if value.number}
