"""Latent Consistency Models: Stable Diffusion with guidance distilled into the UNet, for images in a few steps.

The order of calls is that of LatentConsistencyModelImg2ImgPipeline.__call__. All num_inference_steps are run; strength selects
the range of distilled timesteps from which they are chosen. The last step adds no noise, so its latents are the image's.
"""

from collections.abc import Hashable
from typing import Any

import torch

from img2img_server.engine.request import Request
from img2img_server.errors import InvalidField
from img2img_server.runtime.diffusion.stable_diffusion import StableDiffusion
from img2img_server.runtime.schedulers.cache import SchedulerCache


class LatentConsistencySchedulers(SchedulerCache):
    """Schedulers of a model that supports only LCMScheduler, which applies strength itself."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.names = ("LCM", "LCMScheduler")

    def _check(self, request: Request) -> None:
        self._check_name(request)
        most = self._distilled_steps(request)
        if request.num_inference_steps > most:
            raise InvalidField("num_inference_steps", f"at strength {request.strength:g} the maximum of this model is {most}")

    def _key(self, request: Request) -> Hashable:
        return request.num_inference_steps, self._distilled_steps(request)

    def _scheduler(self, name: str | None) -> Any:
        return super()._scheduler(None)

    def _set(self, view: Any, request: Request, device: torch.device) -> torch.Tensor:
        view.scheduler.set_timesteps(request.num_inference_steps, device=device, strength=request.strength)
        timesteps: torch.Tensor = view.scheduler.timesteps
        return timesteps

    def _distilled_steps(self, request: Request) -> int:
        """The number of distilled timesteps at this strength, by LCMScheduler's rule."""
        return int(self._pipe.scheduler.config.original_inference_steps * request.strength)


class LatentConsistency(StableDiffusion):
    """A Latent Consistency Model: one row per image, because guidance is an embedding and there is no negative prompt."""

    scheduler_cache = LatentConsistencySchedulers
    takes_controls = False  # diffusers has no such pipeline

    def _is_guided(self, request: Request) -> bool:
        return False
