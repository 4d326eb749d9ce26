"""Linear solvers of which the model is called in some steps only: in the others, the image that it predicted last is kept.

A step without a call takes the output with which the model would predict that image again. Steps remain those of the model's own
scheduler, so images stay near to its images, whatever its error. A solver of higher order with fewer steps (DPM-Solver++) comes
nearer to the exact solution of the differential equation, which is another image. Lines through the last two outputs, or through
the last two predicted images, fail where these turn.
"""

from collections.abc import Sequence

import torch

from img2img_server.runtime.schedulers.linear import LinearSolver, Reading, SolverStep, prune

Predicted = tuple[float, float]
"""The factors of the latents and of the model's output in the image that it predicts."""


def skipping(solver: LinearSolver, called: Sequence[int], predicted: Sequence[Predicted]) -> LinearSolver:
    """The solver that calls the model in the steps `called`, which begin with the first, 0. Each of its steps does all of
    `solver` up to the next call. `predicted` has the factors of each step of `solver`, which draws no noise."""
    ends = [*called[1:], len(solver.steps)]
    readings = [
        Reading(_joined(solver.steps[begin:end], predicted[begin:end]), solver.input_scales[begin], False, 0.0)
        for begin, end in zip(called, ends, strict=True)
    ]
    return LinearSolver(solver.timesteps[list(called)], tuple(one.input_scale for one in readings), prune(readings))


def _joined(steps: Sequence[SolverStep], predicted: Sequence[Predicted]) -> torch.Tensor:
    """The coefficients of `steps` as one, as of a `Reading`. Terms are the latents, the output of the first step, and what that
    step remembers; rows are the new latents and what the last step remembers."""
    unit = torch.eye(2 + steps[0].remembered, dtype=torch.float64)
    latents, output, memory = unit[0], unit[1], list(unit[2:])
    image = predicted[0][0] * latents + predicted[0][1] * output
    for number, (step, (share, factor)) in enumerate(zip(steps, predicted, strict=True)):
        if number:
            output = (image - share * latents) / factor
        terms = torch.stack([latents, output, *memory])
        latents, *computed = step.coefficients[: len(terms), : step.rows].double().T @ terms
        available = [*terms, *computed]
        memory = [available[index] for index in step.memory]
    return torch.stack([latents, *memory])
