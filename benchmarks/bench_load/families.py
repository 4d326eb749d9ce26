"""Models with random weights for `scripts/bench load --family`: the fields that their requests have, and their files."""

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from bench_models import saved_model

from bench_load.workloads import Job

_BUNDLES = Path(".bench/bundles")


@dataclass(frozen=True, slots=True)
class Family:
    """A model of `bench_models`, the fields that it takes, and the names of the servers that can run it."""

    model: str
    servers: tuple[str, ...] = ("ours", "lock", "batching")
    has_strength: bool = True
    has_negative_prompt: bool = False
    has_guidance: bool = True

    def adapted(self, job: Job) -> Job:
        """The job without the fields that the model does not take."""
        return replace(
            job,
            strength=job.strength if self.has_strength else None,
            guidance=job.guidance if self.has_guidance else None,
            negative_prompt=job.negative_prompt if self.has_negative_prompt else "",
        )


FAMILIES = {
    "sd3": Family("small-sd3", has_negative_prompt=True),
    "flux": Family("small-flux"),
    "klein": Family("small-klein", ("ours", "lock"), has_strength=False, has_guidance=False),
    "medium-sd3": Family("medium-sd3", has_negative_prompt=True),
    "medium-klein": Family("klein", ("ours", "lock"), has_strength=False, has_guidance=False),
}
"""klein's pipeline sees all images of a call as references of each of its prompts, so whole requests cannot be batched."""


def files_of(family: Family) -> tuple[Path, Path]:
    """The bundle and the diffusers model, made if they are missing."""
    model, bundle = saved_model(family.model, "fp32"), _BUNDLES / family.model
    if not (bundle / "manifest.json").is_file():
        words = [sys.executable, "-m", "img2img_cli", "export", str(model), "--output", str(bundle), "--no-lora-graphs"]
        subprocess.run(words, check=True)
    return bundle.absolute(), model.absolute()
