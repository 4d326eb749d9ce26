"""Control images for built-in control inputs, without a ControlNet of the server: one in each request."""

from dataclasses import replace
from typing import Any, ClassVar

from PIL import Image, ImageFilter

from img2img_server.engine.request import ControlUse, Request
from img2img_server.errors import InvalidField
from img2img_server.support.model_fields import OWN_CONTROL, ModelFields


def check_own_control(request: Request) -> None:
    """Raises InvalidField for controls of a model with a built-in control input: one that names a ControlNet, or
    several."""
    if len(request.controls) > 1:
        raise InvalidField("controls", f"there are {len(request.controls)}, and this model reads one control image")
    for use in request.controls:
        if use.model:
            raise InvalidField("controls[0].model", "this model has a built-in control input: leave model unset")


def with_control(request: Request) -> Request:
    """The request, with a control image. The server's own requests (reference images, warm-up, measurements) have none: if the
    model needs one, they get the edges of the source."""
    if request.controls:
        return request
    return replace(request, controls=(ControlUse("", edges(request.image, request.result_size)),))


def edges(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The edges of an image as an RGB image of that size: white on black."""
    sized = image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
    return sized.convert("L").filter(ImageFilter.FIND_EDGES).convert("RGB")


class OwnControl:
    """Controls of a model with a built-in control input. The model's family defines its effect."""

    fields: ClassVar[ModelFields] = OWN_CONTROL

    def check(self, request: Request) -> None:
        """Raises InvalidField for a control that names a ControlNet, and for several."""
        check_own_control(request)

    def work(self, request: Request) -> float:
        """1: the model always reads one."""
        return 1.0

    def of(self, request: Request, device: Any) -> tuple[()]:
        """Checks the request, and returns no ControlNets to call. Raises InvalidField."""
        self.check(request)
        return ()
