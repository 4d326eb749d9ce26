"""Component by component: does each graph compute what the PyTorch module computes?

Inputs are random but seeded, the sizes small, and each graph sees two of them and batches of one and three. In a batch
every sample has another timestep, which is what the server relies on; one size is odd, which optimum's own graphs refuse.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from img2img_server.bundle import ComponentParity

from img2img_export.errors import ExportError, first_line
from img2img_export.graphs import COMPONENTS, GRAPH_NAME, RUNTIME_ERRORS

RELATIVE_LIMIT = 1e-4
"""Greatest L2 norm of the difference over that of the reference.

Both sides are fp32 (epsilon 6e-8) and differ in the order of their sums only. That grows to some 1e-6 through hundreds of
layers, while the faults that an export makes (a frozen size, one timestep for all, a lost cast) show at 1e-2 and more.
"""
WORST_LIMIT = 1e-3
"""Greatest single difference over the root mean square of the reference: catches one wrong place in a large tensor."""

_LATENT_SIZES = {1: (8, 8), 3: (9, 13)}
_TIMESTEPS = {1: (981.0,), 3: (1.0, 401.0, 999.0)}
_TOKENS = 77
"""Tokens of the UNet's prompts; it takes any number."""

_LEGACY_END = 2
"""Old CLIP configurations say 2 for the end token, and mean the greatest id (transformers pools by argmax then)."""

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison: the graph's inputs by name, and a function that gives PyTorch's outputs by name."""

    name: str
    inputs: dict[str, torch.Tensor]
    reference: Callable[[], dict[str, torch.Tensor]]


def compare_components(pipeline: Any, bundle: Path) -> tuple[ComponentParity, ...]:
    """Compares every graph in `bundle` with the same part of the diffusers pipeline, on the CPU, one session at a time.

    Raises ExportError where ONNX Runtime does not take a graph.
    """
    results: list[ComponentParity] = []
    for component in COMPONENTS:
        path = bundle / component / GRAPH_NAME
        if path.is_file():
            session = _open(component, path)
            results += [_compare(component, session, case) for case in _cases(component, pipeline)]
    return tuple(results)


def _open(component: str, path: Path) -> Any:
    try:
        return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except RUNTIME_ERRORS as error:
        raise ExportError(f"ONNX Runtime cannot open {component}: {first_line(error)}") from error


def _compare(component: str, session: Any, case: Case) -> ComponentParity:
    """The greatest errors over all outputs of the graph."""
    kinds = {item.name: np.int32 if item.type == "tensor(int32)" else None for item in session.get_inputs()}
    inputs = {name: value.numpy().astype(kinds[name] or value.numpy().dtype) for name, value in case.inputs.items()}
    names = [item.name for item in session.get_outputs()]
    actual: Arrays = dict(zip(names, _run(session, names, inputs), strict=True))
    with torch.no_grad():
        expected = {name: value.numpy() for name, value in case.reference().items()}
    worst, relative, limit_kept = 0.0, 0.0, True
    for name in names:
        error = measure(actual[name], expected[name])
        worst, relative = max(worst, error.worst), max(relative, error.relative)
        limit_kept &= error.passed
    return ComponentParity(component, case.name, worst, relative, limit_kept)


def _run(session: Any, names: list[str], inputs: Arrays) -> list[np.ndarray]:
    """The graph's outputs; without a number in them where the runtime refuses the inputs, as a frozen size makes it do."""
    try:
        outputs: list[np.ndarray] = session.run(names, inputs)
    except RUNTIME_ERRORS:
        return [np.array(np.nan)] * len(names)
    return outputs


@dataclass(frozen=True, slots=True)
class Error:
    """How far one tensor is from another: `worst` in its own units, `relative` by L2 norms; infinite where one has no number."""

    worst: float
    relative: float
    passed: bool


def measure(actual: np.ndarray, expected: np.ndarray) -> Error:
    """Compares two tensors. Another shape, or a NaN or an infinity anywhere, never passes."""
    if actual.shape != expected.shape or not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        return Error(float("inf"), float("inf"), False)
    reference = expected.astype(np.float64)
    difference = actual.astype(np.float64) - reference
    worst, norm = float(np.abs(difference).max()), float(np.linalg.norm(reference))
    if norm == 0.0:
        return Error(worst, 0.0 if worst == 0.0 else float("inf"), worst == 0.0)
    relative = float(np.linalg.norm(difference)) / norm
    root_mean_square = norm / reference.size**0.5
    return Error(worst, relative, relative <= RELATIVE_LIMIT and worst <= WORST_LIMIT * root_mean_square)


def _cases(component: str, pipeline: Any) -> Iterator[Case]:
    makers = {"unet": _unet_case, "vae_encoder": _vae_encoder_case, "vae_decoder": _vae_decoder_case}
    for batch, size in _LATENT_SIZES.items():
        generator = torch.Generator("cpu").manual_seed(batch)
        if component in makers:
            yield makers[component](pipeline, batch, size, generator)
        else:
            yield _text_case(getattr(pipeline, component), batch, generator)


def _text_case(encoder: Any, batch: int, generator: torch.Generator) -> Case:
    """Token ids [batch, positions]: words, and from some place on the end token, which pooling looks for."""
    config = encoder.config
    end = config.eos_token_id if config.eos_token_id != _LEGACY_END else config.vocab_size - 1
    ids = torch.randint(config.vocab_size - 2, (batch, config.max_position_embeddings), generator=generator)
    for row in range(batch):
        ids[row, 5 + 9 * row :] = end

    def reference() -> dict[str, torch.Tensor]:
        output = encoder(ids, output_hidden_states=True, return_dict=True)
        hidden = {f"hidden_states.{index}": state for index, state in enumerate(output.hidden_states)}
        return {**{name: value for name, value in output.items() if isinstance(value, torch.Tensor)}, **hidden}

    return Case(f"batch {batch}", {"input_ids": ids}, reference)


def _unet_case(pipeline: Any, batch: int, size: tuple[int, int], generator: torch.Generator) -> Case:
    config = pipeline.unet.config
    inputs = {
        "sample": torch.randn(batch, config.in_channels, *size, generator=generator),
        "timestep": torch.tensor(_TIMESTEPS[batch]),
        "encoder_hidden_states": torch.randn(batch, _TOKENS, config.cross_attention_dim, generator=generator),
    }
    added: dict[str, torch.Tensor] = {}
    if config.addition_embed_type == "text_time":
        count = 5 if pipeline.config.requires_aesthetics_score else 6
        width = pipeline.text_encoder_2.config.projection_dim
        added["text_embeds"] = torch.randn(batch, width, generator=generator)
        added["time_ids"] = torch.randint(1024, (batch, count), generator=generator).float()
    if config.time_cond_proj_dim is not None:
        inputs["timestep_cond"] = torch.randn(batch, config.time_cond_proj_dim, generator=generator)

    def reference() -> dict[str, torch.Tensor]:
        return {"out_sample": pipeline.unet(**inputs, added_cond_kwargs=added or None).sample}

    return Case(_name(batch, size), {**inputs, **added}, reference)


def _vae_encoder_case(pipeline: Any, batch: int, size: tuple[int, int], generator: torch.Generator) -> Case:
    factor = pipeline.vae_scale_factor
    picture = torch.rand(batch, 3, size[0] * factor, size[1] * factor, generator=generator) * 2 - 1
    return Case(
        _name(batch, size),
        {"sample": picture},
        lambda: {"latent_parameters": pipeline.vae.encode(picture).latent_dist.parameters},
    )


def _vae_decoder_case(pipeline: Any, batch: int, size: tuple[int, int], generator: torch.Generator) -> Case:
    latents = torch.randn(batch, pipeline.vae.config.latent_channels, *size, generator=generator)
    latents = latents / pipeline.vae.config.scaling_factor
    return Case(_name(batch, size), {"latent_sample": latents}, lambda: {"sample": pipeline.vae.decode(latents).sample})


def _name(batch: int, size: tuple[int, int]) -> str:
    return f"batch {batch}, latents {size[0]} x {size[1]}"
