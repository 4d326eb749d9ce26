"""Latent Consistency Models: Stable Diffusion whose guidance was distilled into the UNet, for an image in a few steps.

The order of calls is that of LatentConsistencyModelImg2ImgPipeline.__call__. All steps that were asked for are run: strength
says from which of the timesteps that the model was distilled on they are chosen. The last step adds no noise, so its latents
are the image's.
"""

from collections.abc import Hashable
from typing import Any

import torch

from img2img_server.engine.request import Request
from img2img_server.errors import InvalidField
from img2img_server.runtime.diffusion.stable_diffusion import StableDiffusion
from img2img_server.runtime.schedulers.cache import SchedulerCache


class LatentConsistencySchedulers(SchedulerCache):
    """Timetables of a model that steps by LCMScheduler only, which knows of strength."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.names = ("LCM", "LCMScheduler")

    def _check(self, request: Request) -> None:
        self._check_name(request)
        most = self._distilled_steps(request)
        if request.num_inference_steps > most:
            raise InvalidField("num_inference_steps", f"at strength {request.strength:g} this model has {most} steps at most")

    def _key(self, request: Request) -> Hashable:
        return request.num_inference_steps, self._distilled_steps(request)

    def _scheduler(self, name: str | None) -> Any:
        return super()._scheduler(None)

    def _set(self, view: Any, request: Request, device: torch.device) -> torch.Tensor:
        view.scheduler.set_timesteps(request.num_inference_steps, device=device, strength=request.strength)
        timesteps: torch.Tensor = view.scheduler.timesteps
        return timesteps

    def _distilled_steps(self, request: Request) -> int:
        """How many of the timesteps that the model was distilled on strength leaves: LCMScheduler's rule."""
        return int(self._pipe.scheduler.config.original_inference_steps * request.strength)


class LatentConsistency(StableDiffusion):
    """One row for each image: guidance is an embedding, and there is no negative prompt."""

    scheduler_cache = LatentConsistencySchedulers

    def _is_guided(self, request: Request) -> bool:
        return False
