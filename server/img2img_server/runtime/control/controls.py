"""The control images of requests to one model: checked, and in each step the residuals of their ControlNets.

The order of calls is that of StableDiffusionControlNetImg2ImgPipeline.__call__, with both halves of guided requests controlled.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from img2img_server.bundle.controls import is_residual
from img2img_server.engine.request import ControlUse, Request
from img2img_server.errors import InvalidField
from img2img_server.runtime.common.device_copy import send
from img2img_server.runtime.control.nets import ControlNet, ControlNets
from img2img_server.runtime.onnx.modules import OnnxDenoiser

Inputs = Mapping[str, torch.Tensor]

_SHARED = ("sample", "encoder_hidden_states", "text_embeds", "time_ids")
"""The inputs that a ControlNet and its model's UNet both get."""


@dataclass(frozen=True, slots=True, eq=False)
class Control:
    """A control of a request: its ControlNet, its image [1, 3, H, W] from 0 to 1 on the device, and when it applies."""

    net: ControlNet
    image: torch.Tensor
    use: ControlUse

    def scale(self, step: int, step_count: int) -> float:
        """The scale of its residuals in a step, counted from 0; 0 if it does not apply."""
        starts, ends = step / step_count >= self.use.start, (step + 1) / step_count <= self.use.end
        return self.use.scale if starts and ends else 0.0


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a request in the UNet's call, and the controls that apply to them with their scales."""

    rows: range
    controls: Sequence[tuple[Control, float]]


class ModelControls:
    """Controls of one model, whose `denoiser` has a control graph. `scale` is the number of pixels of a latent, on each side;
    `parameters` is the denoiser's number of weights."""

    def __init__(self, nets: ControlNets, denoiser: OnnxDenoiser, scale: int, parameters: float = math.inf) -> None:
        self._nets = nets
        self._parameters = parameters
        self._denoiser = denoiser
        self._scale = scale

    @property
    def shares_calls(self) -> bool:
        """Whether rows with and without controls share calls of the control graph. Else the graphs are on different providers,
        and rows without controls stay in the plain graph."""
        return self._denoiser.control is not None and self._denoiser.control.mixes

    def check(self, request: Request) -> None:
        """Checks that the request's ControlNets fit this model, and opens the control graph. Raises InvalidField."""
        for index, use in enumerate(request.controls):
            problem = self._problem(self._nets.get(use.model))
            if problem:
                raise InvalidField(f"controls[{index}].model", f"ControlNet '{use.model}' does not fit this model: {problem}")

    def work(self, request: Request) -> float:
        """How many times longer a step takes with the request's controls, on average over its steps: a ControlNet takes time in
        proportion to its weights."""
        each = (self._nets.get(use.model).parameters * (use.end - use.start) for use in request.controls)
        return 1 + sum(each) / self._parameters

    def of(self, request: Request, device: torch.device) -> tuple[Control, ...]:
        """The request's controls. Raises InvalidField."""
        self.check(request)
        controls = []
        for use in request.controls:
            pixels = np.asarray(use.image, np.float32).transpose(2, 0, 1)[None] / 255
            controls.append(Control(self._nets.get(use.model), send(torch.from_numpy(pixels), device), use))
        return tuple(controls)

    def residuals(self, parts: Sequence[Rows], inputs: Inputs) -> dict[str, torch.Tensor]:
        """The control graph's further inputs for a call with the rows of `parts` and the UNet's `inputs`; empty if no control
        applies. Each ControlNet is called once; the residuals of a row are summed in the order of its controls."""
        found: dict[str, torch.Tensor] = {}
        total = sum(len(part.rows) for part in parts)
        for order, index, values in sorted(self._calls(parts, total, inputs), key=lambda call: call[0]):
            if not found and order == 0 and len(index) == total:
                found = values  # every row, in order
                continue
            place = send(torch.tensor(index), next(iter(values.values())).device)
            for name, value in values.items():
                if name not in found:
                    found[name] = value.new_zeros(total, *value.shape[1:])
                found[name].index_add_(0, place, value)
        return found

    def _calls(self, parts: Sequence[Rows], total: int, inputs: Inputs) -> list[tuple[int, list[int], dict[str, torch.Tensor]]]:
        """Calls each ControlNet once. Returns its residuals by the order of the control in its request, with their rows."""
        groups: dict[ControlNet, list[tuple[int, Rows, Control, float]]] = {}
        for part in parts:
            for order, (control, scale) in enumerate(part.controls):
                groups.setdefault(control.net, []).append((order, part, control, scale))
        made = []
        for net, group in groups.items():
            group.sort(key=lambda use: use[0])
            index = [row for _, part, _, _ in group for row in part.rows]
            scales = torch.tensor([scale for _, part, _, scale in group for _ in part.rows])
            images = torch.cat([control.image.expand(len(part.rows), -1, -1, -1) for _, part, control, _ in group])
            rows = send(torch.tensor(index), images.device)
            own = inputs if index == list(range(total)) else {name: value[rows] for name, value in inputs.items()}
            values = net(images, send(scales, images.device), own)
            start = 0
            for order in sorted({use[0] for use in group}):
                mine = [row for use_order, part, _, _ in group if use_order == order for row in part.rows]
                piece = {name: value[start : start + len(mine)] for name, value in values.items()}
                made.append((order, mine, piece))
                start += len(mine)
        return made

    def _problem(self, net: ControlNet) -> str:
        """Why a ControlNet does not fit the model, or ""."""
        assert self._denoiser.control is not None, "the model has a control graph"
        wanted = self._denoiser.control.get().widths
        if net.scale != self._scale:
            return f"it has {net.scale} pixels for each latent, the model {self._scale}"
        shared = [name for name in wanted if is_residual(name) or name in _SHARED]
        for name in (*shared, *(name for name in net.widths if is_residual(name) or name in _SHARED)):
            if net.widths.get(name) != wanted.get(name):
                return (
                    f"it is for another family or size: {name} has {net.widths.get(name, 0)} channels in the ControlNet "
                    f"and {wanted.get(name, 0)} in the model"
                )
        return ""


@dataclass(frozen=True, slots=True)
class NoControls:
    """Refuses the controls of requests to a model that takes none; `why` completes "this model takes no controls: it ..."."""

    why: str

    def check(self, request: Request) -> None:
        """Raises InvalidField if the request has controls."""
        if request.controls:
            raise InvalidField("controls", f"this model takes no controls: it {self.why}")

    def work(self, request: Request) -> float:
        """1: there are no controls."""
        return 1.0

    def of(self, request: Request, device: Any) -> tuple[()]:
        """Raises InvalidField if the request has controls."""
        self.check(request)
        return ()
