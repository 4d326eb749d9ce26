"""Cost of a scheduler step: diffusers' scheduler for each request, compared with one compiled step for all requests."""

import argparse
import statistics
import time
from typing import Any

from rich.console import Console
from rich.table import Table

_NAMES = ("Euler", "Euler a", "DDIM", "DPM++ 2M Karras", "UniPC", "PNDM", "LCM")
_STEPS = 25


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this sub-command."""
    parser.add_argument("--requests", type=int, default=8, metavar="N", help="requests in a batch (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=9, metavar="N", help="rounds; the median is reported (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measures each scheduler at two sizes and prints a table."""
    import torch
    from diffusers import DDIMScheduler

    torch.set_num_threads(1)
    own = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1)
    title = f"microseconds per step of {arguments.requests} requests, median of {arguments.rounds} x {_STEPS} steps"
    columns = ("scheduler", "latents", "diffusers, one by one", "compiled, together", "ratio", "to compile, once, ms")
    table = Table(*columns, title=title)
    with torch.inference_mode():
        for side in (16, 64):
            for name in _NAMES:
                single, batch, compiling = _measure(own, name, side, arguments.requests, arguments.rounds)
                row = (f"{single:.0f}", f"{batch:.0f}", f"{single / batch:.1f}", f"{compiling:.1f}")
                table.add_row(name, f"{side} x {side}", *row)
    Console(width=120).print(table)
    return 0


def _measure(own: Any, name: str, side: int, count: int, rounds: int) -> tuple[float, float, float]:
    """Microseconds of a step of `count` requests with diffusers and compiled, in turns, and milliseconds to compile."""
    import torch
    from img2img_server.runtime.schedulers import registry
    from img2img_server.runtime.schedulers.linear import Trajectory, advance_batch, compile_schedule

    def ready() -> Any:
        made = registry.make(name, own)
        made.set_timesteps(_STEPS)
        if hasattr(made, "set_begin_index"):
            made.set_begin_index(0)
        return made

    first = ready()
    begun = time.perf_counter()
    schedule = compile_schedule(first, first.timesteps)
    compiling = (time.perf_counter() - begun) * 1e3
    assert schedule is not None, "all names compile: tests/server/test_schedulers.py"
    steps = range(min(_STEPS, len(schedule.steps)))
    latents, outputs = ([torch.randn(1, 4, side, side) for _ in range(count)] for _ in range(2))
    single, batch = [], []
    for _ in range(rounds):
        own_copies = [ready() for _ in range(count)]
        begun = time.perf_counter()
        for step in steps:
            for scheduler, sample, output in zip(own_copies, latents, outputs, strict=True):
                scheduler.step(output, schedule.timesteps[step], sample, return_dict=False)
        single.append(time.perf_counter() - begun)
        trajectories = [Trajectory(schedule, [torch.Generator()]) for _ in range(count)]
        begun = time.perf_counter()
        for _ in steps:
            advance_batch(trajectories, latents, outputs)
        batch.append(time.perf_counter() - begun)
    microseconds = 1e6 / len(steps)
    return statistics.median(single) * microseconds, statistics.median(batch) * microseconds, compiling
