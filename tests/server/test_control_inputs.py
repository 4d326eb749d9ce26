"""Calls of the control graph that lack residuals or image prompts: as with zeros of the full shapes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from drawing import load
from img2img_server.bundle.controls import DOWN, is_residual
from img2img_server.bundle.image_prompts import BIAS, STATES, layer_widths, states_width
from img2img_server.runtime.onnx.modules import OnnxDenoiser, missing_inputs, needs_control_graph

Get = Callable[[str], Path]


@pytest.fixture
def denoiser(bundle: Get) -> Iterator[OnnxDenoiser]:
    pipeline = load(bundle("sd1"))
    yield pipeline._denoiser
    pipeline.close()


@pytest.fixture
def call() -> dict[str, Any]:
    """Arguments of a UNet's call of three rows."""
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(3, 4, 9, 13, generator=generator),
        "timestep": torch.tensor([900.0, 500.0, 3.0]),
        "encoder_hidden_states": torch.randn(3, 77, 32, generator=generator),
    }


def residuals(denoiser: OnnxDenoiser) -> dict[str, torch.Tensor]:
    """Random residuals of the shapes that a ControlNet gives for `call`."""
    assert denoiser.control is not None
    widths = {name: width for name, width in denoiser.control.get().widths.items() if is_residual(name)}
    sizes = ((9, 13), (9, 13), (5, 7), (5, 7), (5, 7))
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(3, width, *size, generator=generator) for (name, width), size in zip(widths.items(), sizes, strict=True)
    }


def prompts(denoiser: OnnxDenoiser) -> dict[str, torch.Tensor]:
    """Random image prompts of two adapters with four tokens."""
    width = states_width(layer_widths(denoiser.config))
    states = torch.randn(3, 2, 4, width, generator=torch.Generator().manual_seed(2))
    return {STATES: states, BIAS: torch.zeros(3, 2, 4)}


def zeros(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def predict(denoiser: OnnxDenoiser, call: dict[str, Any], further: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    (found,) = denoiser(**call, return_dict=False, **({} if further is None else {DOWN: further}))
    return torch.as_tensor(found)


def test_missing_inputs_count_as_zeros(denoiser: OnnxDenoiser, call: dict[str, Any]) -> None:
    added, shown = residuals(denoiser), prompts(denoiser)
    assert torch.equal(predict(denoiser, call, added), predict(denoiser, call, added | zeros(shown)))
    assert torch.equal(predict(denoiser, call, shown), predict(denoiser, call, zeros(added) | shown))
    plain = predict(denoiser, call)
    assert torch.equal(predict(denoiser, call, zeros(shown)), plain)
    for further in (added, shown):
        assert (predict(denoiser, call, further) - plain).abs().amax(dim=(1, 2, 3)).min() > 1e-2


def test_control_graphs_of_older_bundles_have_residuals_only(denoiser: OnnxDenoiser, call: dict[str, Any]) -> None:
    assert denoiser.control is not None
    assert denoiser.control.image_prompts
    graph, added = denoiser.control.get(), residuals(denoiser)
    older = {name: kind for name, kind in graph.input_types.items() if name not in (STATES, BIAS)}
    assert missing_inputs(older, graph.widths, call | added) == {}
    assert missing_inputs(graph.input_types, graph.widths, call | added).keys() == {STATES, BIAS}
    assert not needs_control_graph(call)
    assert needs_control_graph(call | added)
    assert needs_control_graph(call | prompts(denoiser))
