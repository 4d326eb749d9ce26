"""The control images of requests to one model: checked, and in each step the residuals of their ControlNets.

The order of calls is that of StableDiffusionControlNetImg2ImgPipeline.__call__, with both halves of guided requests controlled,
and that of FluxControlNetImg2ImgPipeline.__call__.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from img2img_server.bundle.control_kinds import check_fit, kind_of_model
from img2img_server.bundle.controls import MODE
from img2img_server.engine.request import ControlUse, Request
from img2img_server.errors import InvalidField
from img2img_server.runtime.common.device_copy import send
from img2img_server.runtime.companions import Companions
from img2img_server.runtime.control.nets import ControlNet, FluxControlNet, Inputs
from img2img_server.runtime.control.residuals import Called, of_flux, of_unet
from img2img_server.runtime.onnx.modules import OnnxDenoiser
from img2img_server.support.model_fields import CONTROLNETS, ModelFields


@dataclass(frozen=True, slots=True, eq=False)
class Control:
    """A control of a request: its ControlNet, its image on the device, and when it applies. The image is [1, 3, H, W], or for
    nets that read latents [images, N, C]."""

    net: ControlNet
    image: torch.Tensor
    use: ControlUse

    def images(self, rows: int) -> torch.Tensor:
        """The image for each of its request's rows."""
        return self.image if len(self.image) == rows else self.image.expand(rows, *self.image.shape[1:])

    def scale(self, step: int, step_count: int) -> float:
        """The scale of its residuals in a step, counted from 0; 0 if it does not apply."""
        starts, ends = step / step_count >= self.use.start, (step + 1) / step_count <= self.use.end
        return self.use.scale if starts and ends else 0.0


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a request in the UNet's call, and the controls that apply to them with their scales. Of a guided request the
    second half has the prompt, the first one the negative prompt."""

    rows: range
    controls: Sequence[tuple[Control, float]]
    guided: bool = False

    def of(self, net: ControlNet) -> range:
        """The rows that a ControlNet applies to."""
        return self.rows[len(self.rows) // 2 :] if self.guided and net.pools else self.rows


class ModelControls:
    """Controls of one model, whose `denoiser` has a control graph. `scale` is the number of pixels of a latent, on each side;
    `parameters` is the denoiser's number of weights."""

    fields: ClassVar[ModelFields] = CONTROLNETS

    def __init__(self, companions: Companions, denoiser: OnnxDenoiser, scale: int, parameters: float = math.inf) -> None:
        self._companions = companions
        self._parameters = parameters
        self._denoiser = denoiser
        self._kind = kind_of_model(denoiser.config, scale)

    def check(self, request: Request) -> None:
        """Checks that the request's ControlNets fit this model, and opens the control graph. Raises InvalidField."""
        for index, use in enumerate(request.controls):
            net = self._companions.get(use.model, ControlNet)
            check_fit(f"controls[{index}].model", use.model, net.kind, self._kind)
            _check_mode(f"controls[{index}].{MODE}", use, net.modes)
        if request.controls and self._denoiser.control is not None:
            self._denoiser.control.get()

    def work(self, request: Request) -> float:
        """How many times longer a step takes with the request's controls, on average over its steps: a ControlNet takes time in
        proportion to its weights."""
        each = (self._companions.get(use.model, ControlNet).parameters * (use.end - use.start) for use in request.controls)
        return 1 + sum(each) / self._parameters

    def of(self, request: Request, device: torch.device) -> tuple[Control, ...]:
        """The request's controls. Raises InvalidField."""
        self.check(request)
        controls = []
        for use in request.controls:
            pixels = np.asarray(use.image, np.float32).transpose(2, 0, 1)[None] / 255
            net = self._companions.get(use.model, ControlNet)
            controls.append(Control(net, send(net.pixels(torch.from_numpy(pixels)), device), use))
        return tuple(controls)

    def residuals(self, parts: Sequence[Rows], inputs: Inputs) -> dict[str, torch.Tensor]:
        """The control graph's further inputs for a call with the rows of `parts` and the denoiser's `inputs`; empty if no control
        applies. Each ControlNet is called once for all control images of one size; the residuals of a row are summed in the order
        of its controls."""
        total = sum(len(part.rows) for part in parts)
        calls = sorted(self._calls(parts, total, inputs), key=lambda call: call.order)
        config = self._denoiser.config
        if any(isinstance(control.net, FluxControlNet) for part in parts for control, _ in part.controls):
            return of_flux(calls, total, config["num_layers"], config["num_single_layers"])
        return of_unet(calls, total)

    def _calls(self, parts: Sequence[Rows], total: int, inputs: Inputs) -> list[Called]:
        """Calls the ControlNets. Returns the residuals of each call for each order of controls in requests."""
        groups: dict[tuple[ControlNet, torch.Size], list[tuple[int, Rows, Control, float]]] = {}
        for part in parts:
            for order, (control, scale) in enumerate(part.controls):
                groups.setdefault((control.net, control.image.shape[1:]), []).append((order, part, control, scale))
        made = []
        for (net, _), group in groups.items():
            group.sort(key=lambda use: use[0])
            index = [row for _, part, _, _ in group for row in part.of(net)]
            scales = torch.tensor([scale for _, part, _, scale in group for _ in part.of(net)])
            modes = torch.tensor([control.use.mode or 0 for _, part, control, _ in group for _ in part.of(net)])
            images = torch.cat([control.images(len(part.of(net))) for _, part, control, _ in group])
            device = images.device
            rows = send(torch.tensor(index), device)
            own = inputs
            if index != list(range(total)):
                own = {name: value[rows] for name, value in inputs.items()}
            values = net(images, send(modes, device), send(scales, device), own)
            start = 0
            for order in sorted({use[0] for use in group}):
                mine = [row for use_order, part, _, _ in group if use_order == order for row in part.of(net)]
                piece = {name: value[start : start + len(mine)] for name, value in values.items()}
                made.append(Called(order, mine, piece, net.repeats))
                start += len(mine)
        return made


def _check_mode(field: str, use: ControlUse, modes: int | None) -> None:
    """Raises InvalidField, naming `field`, for a mode that a ControlNet with this number of modes (None: no union) lacks."""
    if modes is None and use.mode is not None:
        raise InvalidField(field, f"ControlNet '{use.model}' is not a union, and reads images of one kind: leave it out")
    if modes is not None and not (use.mode is not None and 0 <= use.mode < modes):
        found = "is missing" if use.mode is None else f"is {use.mode}"
        raise InvalidField(
            field, f"it {found}: ControlNet '{use.model}' is a union, which reads images of the kinds 0 to {modes - 1}"
        )


@dataclass(frozen=True, slots=True)
class NoControls:
    """Refuses the controls of requests to a model that takes none; `why` completes "this model takes no controls: it ..."."""

    why: str
    fields: ClassVar[ModelFields] = {}

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
