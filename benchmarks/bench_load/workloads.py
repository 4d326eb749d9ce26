"""Workloads: lists of jobs, determined by a seed and the same for every server.

The length of a list is a budget of work in units, which a calibration converts to seconds. One unit is one UNet pass of a
128 x 128 image.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

SOURCES = ("noon-lake.png", "noon-hills.png", "noon-dunes.png")
SIZES = ((128, 128), (192, 128))
STEPS = (4, 8, 12, 20, 25, 30, 50)
STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
DEFAULT_PROMPT = "A beautiful landscape with mountains and a lake at sunset"
PROMPTS = tuple(
    f"{opening} with {things} {when}"
    for opening in ("a beautiful landscape", "a photo of a landscape")
    for things in ("mountains and a lake", "rolling hills", "desert dunes", "high mountains and trees")
    for when in ("at sunset", "at night", "in winter", "in autumn", "in the fog")
)
"""40 prompts with words from the demo model's training."""
FIXED_UNITS = 4.0
"""Cost of encoders, decoder and codecs per image, in UNet passes: 21 ms, with about 6 ms per pass."""


@dataclass(frozen=True, slots=True)
class Source:
    """A source image, derived from one of the demo's images."""

    name: str = SOURCES[0]
    size: tuple[int, int] = SIZES[0]
    flipped: bool = False
    cropped: bool = False
    noise_seed: int | None = None
    """Seed of a little noise that makes the image unique; None for no noise."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request. Steps, strength and guidance are the contract's num_inference_steps, strength and guidance_scale; None if the
    model does not take it."""

    prompt: str
    source: Source
    steps: int
    strength: float | None
    guidance: float | None
    seed: int
    negative_prompt: str = ""

    @property
    def denoising_steps(self) -> int:
        """The number of denoising steps, by diffusers' rule."""
        return self.steps if self.strength is None else min(int(self.steps * self.strength), self.steps)

    @property
    def units(self) -> float:
        """The approximate work."""
        width, height = self.source.size
        rows = 2 if self.guidance is not None and self.guidance > 1 else 1
        return width * height / 128**2 * (self.denoising_steps * rows + FIXED_UNITS)


Draw = Callable[[random.Random], Job]


@dataclass(frozen=True, slots=True)
class Workload:
    """How jobs are generated and sent.

    A closed loop has `concurrency` clients that each send the next job when their last is answered. An open loop (`load`) sends
    jobs by a Poisson process at `load` times the capacity of peer "lock". With `foreground`, the closed loop is the background of
    a further client that sends other jobs with pauses; only that client is measured.
    """

    name: str
    title: str
    draw: Draw
    concurrency: int = 0
    load: float = 0.0
    foreground: Draw | None = None
    share: float = 1.0
    """The share of the seconds of a round."""


def draw_mixed(source_of: random.Random) -> Job:
    """Mixed settings: 20 % without guidance, 30 % with a negative prompt, two sizes, 12 images, 40 prompts."""
    return Job(
        prompt=source_of.choice(PROMPTS),
        source=Source(
            name=source_of.choice(SOURCES),
            size=source_of.choice(SIZES),
            flipped=source_of.random() < 0.5,
            cropped=source_of.random() < 0.5,
        ),
        steps=source_of.choice(STEPS),
        strength=source_of.choice(STRENGTHS),
        guidance=1.0 if source_of.random() < 0.2 else 7.5,
        negative_prompt="blurry ugly low quality" if source_of.random() < 0.3 else "",
        seed=source_of.randrange(2**31),
    )


def draw_different(source_of: random.Random) -> Job:
    """The same mix without repeated images and prompts, so that no cache helps."""
    mixed = draw_mixed(source_of)
    noise_seed = source_of.randrange(2**31)
    source = mixed.source
    return Job(
        prompt=f"{mixed.prompt} {noise_seed}",
        source=Source(source.name, source.size, source.flipped, source.cropped, noise_seed),
        steps=mixed.steps,
        strength=mixed.strength,
        guidance=mixed.guidance,
        negative_prompt=mixed.negative_prompt,
        seed=mixed.seed,
    )


def draw_editing(source_of: random.Random) -> Job:
    """A user who tries three prompts on one image, with few steps and new seeds."""
    return Job(
        prompt=source_of.choice(PROMPTS[:3]),
        source=Source(),
        steps=source_of.choice((4, 8)),
        strength=source_of.choice((0.5, 0.75, 1.0)),
        guidance=7.5,
        seed=source_of.randrange(2**31),
    )


def draw_long(source_of: random.Random) -> Job:
    """50 guided steps."""
    return _draw_fixed(source_of, 50, 1.0)


def draw_short(source_of: random.Random) -> Job:
    """4 guided steps."""
    return _draw_fixed(source_of, 4, 1.0)


def draw_uniform(source_of: random.Random) -> Job:
    """The default settings with different prompts and images: the best case for batching of whole requests."""
    return _draw_fixed(source_of, 25, 0.8)


def draw_repeated(source_of: random.Random) -> Job:
    """The default transform with a random seed."""
    return Job(DEFAULT_PROMPT, Source(), 25, 0.8, 7.5, source_of.randrange(2**31))


def _draw_fixed(source_of: random.Random, steps: int, strength: float) -> Job:
    source = Source(source_of.choice(SOURCES), flipped=source_of.random() < 0.5, cropped=source_of.random() < 0.5)
    return Job(source_of.choice(PROMPTS), source, steps, strength, 7.5, source_of.randrange(2**31))


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("saturation", "16 clients, mixed settings", draw_mixed, concurrency=16),
        Workload("different", "16 clients, mixed settings, nothing twice", draw_different, concurrency=16),
        Workload("editing", "4 clients, one image, 3 prompts, few steps", draw_editing, concurrency=4, share=0.5),
        Workload("short", "4-step requests, concurrent with 4 x 50-step ones", draw_long, concurrency=4, foreground=draw_short),
        Workload("open50", "Poisson arrivals, 0.5 x the capacity of lock", draw_mixed, load=0.5),
        Workload("open80", "Poisson arrivals, 0.8 x the capacity of lock", draw_mixed, load=0.8),
        Workload("open120", "Poisson arrivals, 1.2 x the capacity of lock", draw_mixed, load=1.2),
        Workload("uniform", "8 clients, all the default settings", draw_uniform, concurrency=8, share=0.7),
        Workload("crowd", "16 clients, all the default settings", draw_uniform, concurrency=16, share=0.7),
        Workload("alone", "1 client, the default transform", draw_repeated, concurrency=1, share=0.4),
    )
}


def generator(seed: int, *names: object) -> random.Random:
    """A random generator, independent for different names."""
    return random.Random(":".join(str(name) for name in (seed, *names)))


def jobs(draw: Draw, source_of: random.Random) -> Iterator[Job]:
    """An endless sequence of jobs."""
    while True:
        yield draw(source_of)


def jobs_worth(draw: Draw, source_of: random.Random, units: float, least: int) -> list[Job]:
    """Jobs of `units` of work in all, but at least `least` jobs."""
    made: list[Job] = []
    total = 0.0
    for job in jobs(draw, source_of):
        if total >= units and len(made) >= least:
            return made
        made.append(job)
        total += job.units
    raise AssertionError("jobs() has no end")


def arrivals(source_of: random.Random, count: int, rate: float) -> list[float]:
    """Arrival times in seconds of `count` jobs: a Poisson process of `rate` per second."""
    times: list[float] = []
    now = 0.0
    for _ in range(count):
        now += source_of.expovariate(rate)
        times.append(now)
    return times
