"""Exports cut short, for tests that look at something else than the images that are compared at an export's end."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, BinaryIO, cast
from unittest.mock import patch

import torch
from img2img_export import attempts, component
from img2img_export.verify import images, latent_preview, speedups


@contextmanager
def cut_short(
    count: int = 1, preview: bool = False, two_sizes: bool = False, further: bool = False, controls: bool = True
) -> Iterator[None]:
    """Within the block, an export compares `count` images, makes graphs for LoRAs and ControlNets only if `further`, none for
    ControlNets without `controls`, and is shortened as `brief` describes. The images have one size, unless `two_sizes`: then the
    last is the export's last, of the other size. Do not ask for a shared bundle inside."""
    all_cases = images.image_cases

    def some(*arguments: Any) -> tuple[images.ImageCase, ...]:
        cases = all_cases(*arguments)
        return (*cases[: count - 1], cases[-1]) if two_sizes else cases[:count]

    with patch.object(images, "image_cases", some), brief(preview), without_further_graphs(further, further and controls):
        yield


@contextmanager
def without_further_graphs(loras: bool = False, controls: bool = False) -> Iterator[None]:
    """Within the block, an export makes no graphs for LoRAs and ControlNets, three of a UNet's four, except the requested
    ones."""
    with (
        nullcontext() if loras else patch.object(attempts, "DENOISERS", ()),
        nullcontext() if controls else patch.object(attempts, "CONTROL_GRAPHS", ()),
    ):
        yield


@contextmanager
def brief(preview: bool = False) -> Iterator[None]:
    """Within it, an export fits no preview unless `preview`, which takes a fifth of the export of a tiny model, keeps memory that
    it could free, and traces no module that another export of these tests has traced."""
    fit = latent_preview.fit
    with (
        patch.object(latent_preview, "fit", fit if preview else lambda pipeline: ()),
        patch.object(component, "release_memory", lambda: None),
        patch.object(attempts, "release_memory", lambda: None),
        traced_once(Path(os.environ["TESTS_TRACES"])) if "TESTS_TRACES" in os.environ else nullcontext(),
    ):
        yield


@contextmanager
def short_speedups() -> Iterator[None]:
    """Within the block, an export measures one or two speedups of each kind on three images of few steps, and keeps all, although
    random weights give a low PSNR."""
    with (
        patch.object(speedups, "_PROMPTS", speedups._PROMPTS[:1]),
        patch.object(speedups, "_FULL_SHARES", (0.4,)),
        patch.object(speedups, "_PERIODS", (2, 3)),
        patch.object(speedups, "_SKIPPED", ((0.2, 3),)),
        patch.object(speedups, "DEFAULT_STEPS", 8),
        patch.object(speedups, "_LEAST_PSNR_DB", 0.0),
    ):
        yield


@contextmanager
def traced_once(kept: Path) -> Iterator[None]:
    """Within the block, torch traces each module once, and the graph is kept in `kept`: almost half of the export of a tiny
    model.

    A graph has no weights, so it depends on the parts of `_trace_key` only: the module's layers, its call, and the inputs to
    trace with.
    """
    export: Callable[..., object] = torch.onnx.export

    def export_once(flat: Any, inputs: tuple[torch.Tensor, ...], file: BinaryIO, **options: Any) -> None:
        path = kept / f"{_trace_key(flat, inputs, options)}.onnx"
        if not path.is_file():
            export(flat, inputs, file, **options)
            file.seek(0)
            partial = path.with_suffix(f".{os.getpid()}")
            partial.write_bytes(file.read())
            partial.rename(path)
            return
        file.write(path.read_bytes())

    kept.mkdir(parents=True, exist_ok=True)
    with patch.object(torch.onnx, "export", export_once):
        yield


def _trace_key(flat: Any, inputs: tuple[torch.Tensor, ...], options: Mapping[str, Any]) -> str:
    module = flat.module
    content = (
        repr(module),
        getattr(module, "config", None),
        dict(module.named_parameters()),
        dict(module.named_buffers()),
        inputs,
        options,
        flat._call_by_name,
        torch.nn.functional.scaled_dot_product_attention,  # which a graph with fused attention exchanges
    )
    found = hashlib.sha256()
    _update(found.update, content)
    return found.hexdigest()


def _update(update: Callable[[bytes], None], value: Any) -> None:
    """Hashes nested values: tensors of numbers that a call may branch on by value, others by type and shape; functions by their
    code and what they close over."""
    update(type(value).__qualname__.encode())
    if isinstance(value, torch.Tensor):
        update(f"{value.dtype} {tuple(value.shape)} {'' if value.is_floating_point() else value.tolist()}".encode())
    elif isinstance(value, list | tuple):
        update(str(len(value)).encode())
        for item in value:
            _update(update, item)
    elif (parts := _parts(value)) is not None:
        for key, item in parts.items():
            if key != "_name_or_path":  # where the model was loaded from
                update(repr(key).encode())
                _update(update, item)
    else:
        update(repr(value).encode())


def _parts(value: Any) -> Mapping[Any, Any] | None:
    """The parts of a value, None if its text describes it completely."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, FunctionType):
        return {"code": value.__code__, "closure": [cell.cell_contents for cell in value.__closure__ or ()]}
    if isinstance(value, CodeType):
        return {name: getattr(value, name) for name in ("co_code", "co_names", "co_consts")}
    if hasattr(value, "to_dict"):
        return cast(Mapping[str, Any], value.to_dict())
    return vars(value) if hasattr(value, "__dict__") and not isinstance(value, type) else None
