"""The loop of every training: gradients, rates, optimizers, progress, checkpoints."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from checkpoints import Checkpoint
from torch import Tensor
from torch.optim import Optimizer


def run_steps(
    name: str,
    steps: int,
    loss: Callable[[int], Tensor],
    weights: Iterable[Tensor],
    optimizers: Iterable[tuple[Optimizer, float]],
    factor: Callable[[int], float],
    checkpoint: Checkpoint,
    *,
    every: int = 100,
    shown: int = 25,
    after: Callable[[int], Any] = lambda step: None,
    saved: Callable[[], str | None] = lambda: None,
) -> None:
    """Do the steps that the checkpoint does not have yet, which is written after `every` steps and the last one.

    In each step the gradients of `loss(step)` to the `weights` are scaled to a norm of at most 1; then each optimizer makes a
    step, at its rate times `factor(step)`; then `after(step)` is called. The smoothed loss is printed every `shown` steps,
    never for 0. `saved` is called after the checkpoint was written, and its text is printed.
    """

    def say(step: int, text: str) -> None:
        print(f"{name} {step + 1}/{steps} {text} {time.monotonic() - started:.0f} s", flush=True)

    weights, optimizers = list(weights), list(optimizers)
    started, smooth, first = time.monotonic(), 1.0, checkpoint.restore()
    for step in range(first, steps):
        value = loss(step)
        for weight in weights:
            weight.grad = None
        torch.autograd.backward(value)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for optimizer, rate in optimizers:
            optimizer.param_groups[0]["lr"] = rate * factor(step)
            optimizer.step()
        after(step)
        smooth += (value.item() - smooth) * max(0.02, 1 / (step - first + 1))
        if shown and (step + 1) % shown == 0:
            say(step, f"loss {smooth:.5f}")
        if (step + 1) % every == 0 or step + 1 == steps:
            checkpoint.save(step + 1)
            if text := saved():
                say(step, text)
