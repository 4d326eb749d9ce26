"""The settings of a run of `scripts/gpu_check`, and its targets."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

AIMS = {"preflight": 20.0, "unet-sd15": 5.0, "unet-sdxl": 34.0, "image": 130.0, "cold": 20.0}
"""Upper limits on an H200. In ms: a UNet call of 2 rows at 512 px (SD 1.5) and 1024 px (SDXL), a 512 px image. In s: the rest."""

FLOORS = {
    "unet-sd15": 2.03,
    "unet-sdxl": 17.1,
    "vae_encoder-512": 1.4,
    "vae_decoder-512": 3.2,
    "vae_encoder-1024": 6.2,
    "vae_decoder-1024": 13.3,
}
"""Lower bounds in milliseconds of an H200, at 790 TFLOP/s and 4.3 TB/s."""

READY_NAME = ".ready"
"""Files in a model's folder that mark its graphs, or its weights, as complete; they contain the precision."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a run.

    `folder` is for models with weights, `graphs` has the graphs without weights (weightless.py), `out` is the results file.
    `seconds` is the duration of each comparison. `values` is False if the device computes nothing, as the fake CUDA libraries
    of tests/cuda do: then results are not checked.
    """

    folder: Path
    graphs: Path
    out: Path
    provider: str = "cuda"
    tiny: bool = False
    compile: bool = True
    values: bool = True
    seconds: float = 4.0
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))

    @property
    def device(self) -> str:
        """torch's name of the device: "cuda" or "cpu"."""
        return "cuda" if self.provider == "cuda" else "cpu"

    @property
    def precision(self) -> str:
        """The precision of the graphs: the CPU provider has no fused operators and is slow in fp16."""
        return "fp16" if self.device == "cuda" else "fp32"

    @property
    def dtype(self) -> Any:
        """The same as a torch.dtype."""
        import torch

        return torch.float16 if self.precision == "fp16" else torch.float32

    @property
    def synchronize(self) -> Callable[[], None]:
        """Waits for the device."""
        from img2img_server.tools.bench_measuring import synchronizer

        return synchronizer((self.provider,))

    def aim(self, name: str) -> float | None:
        """The value in AIMS; None for tiny models and CPUs."""
        return AIMS[name] if self.device == "cuda" and not self.tiny else None

    def floor(self, name: str) -> float | None:
        """The value in FLOORS; None if unknown."""
        return FLOORS.get(name) if self.device == "cuda" and not self.tiny else None

    def kind(self, model: str) -> str:
        """The name in models.NAMES of "sd15" or "sdxl": the tiny variant if `tiny`."""
        return f"tiny-{model.removeprefix('tiny-')}" if self.tiny else model

    def side(self, model: str) -> int:
        """Width and height of the model's images in pixels."""
        return 64 if self.tiny else {"sd15": 512, "sdxl": 1024}[model]

    def bundle(self, model: str) -> Path:
        """The folder of the model with weights."""
        return self.folder / self.kind(model)

    def words(self) -> list[str]:
        """The command-line flags of these settings."""
        words = ["--folder", str(self.folder), "--graphs", str(self.graphs), "--out", str(self.out)]
        words += ["--provider", self.provider, "--seconds", str(self.seconds), "--threads", str(self.threads)]
        return words + ["--tiny"] * self.tiny + ["--no-compile"] * (not self.compile) + ["--no-values"] * (not self.values)
