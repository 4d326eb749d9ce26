"""What a step's model output says about the finished latents (the x0 of the diffusion papers), for previews.

Every scheduler that image-to-image can use has `add_noise`, by which it states its own noise level: latents = a x0 + b noise.
With the level and the kind of prediction, x0 follows. So it does not matter whether a scheduler keeps `alphas_cumprod` (DDIM),
sigmas of a variance-exploding process (Euler), flow-matching sigmas, or the preconditioning of EDM (Karras et al., 2022).
"""

import copy
import math
from typing import Any

import torch


def noise_level(scheduler: Any, timestep: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """The factors of x0 and of noise in the latents at `timestep` [1], computed in `dtype` on the CPU. Does not change the
    scheduler."""
    level = copy.copy(scheduler)  # add_noise moves its tables to where the latents are
    one, zero = torch.ones(1, 1, 1, 1, dtype=dtype), torch.zeros(1, 1, 1, 1, dtype=dtype)
    return float(level.add_noise(one, zero, timestep)), float(level.add_noise(zero, one, timestep))


def predict_original(
    scheduler: Any, index: int, timestep: torch.Tensor, sample: torch.Tensor, output: torch.Tensor, input_scale: float
) -> torch.Tensor | None:
    """The latents [n, C, h, w] without noise that the model's `output` predicts for `sample`, both [n, C, h, w].

    `index` is the step's position in all of the scheduler's timesteps, `timestep` its value, `input_scale` the factor by which
    the scheduler scales latents for the model. The scheduler is not changed. None if it does not say what its model predicts.
    """
    at_step = copy.copy(scheduler)
    if hasattr(at_step, "set_begin_index"):
        at_step._step_index = None
        at_step.set_begin_index(index)  # add_noise then uses this step's level
    signal, noise = noise_level(at_step, timestep.cpu().reshape(1))
    if hasattr(scheduler, "precondition_outputs"):  # EDM
        original: torch.Tensor = scheduler.precondition_outputs(sample, output, torch.tensor(noise))
        return original
    if signal == 1.0 and input_scale < 1.0:
        # A variance-exploding process. KDPM2's middle steps have a level of their own, which only the scale shows.
        noise = math.sqrt(input_scale**-2 - 1.0)
    match scheduler.config.get("prediction_type"):
        case "epsilon":
            return (sample - noise * output) / signal if signal else None
        case "sample":
            return output
        case "v_prediction":
            squared = signal**2 + noise**2
            return signal / squared * sample - noise / math.sqrt(squared) * output
        case "flow_prediction":
            return sample - noise * output
    return None
