"""What `scripts/gpu_check` is told, the lines that it prints, and what they are measured by."""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLOORS = {
    "unet-sd15": 2.03,
    "unet-sdxl": 17.1,
    "vae_encoder-sd15": 1.4,
    "vae_decoder-sd15": 3.2,
    "vae_encoder-sdxl": 6.2,
    "vae_decoder-sdxl": 13.3,
    "picture": 130.0,
    "cold": 20.0,
}
"""Milliseconds that an H200 needs at least, at 790 TFLOP/s and 4.3 TB/s; of `picture` (ms) and `cold` (s) what is aimed at."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the table. `passed` is None where nothing is aimed at."""

    section: str
    name: str
    value: float | None = None
    unit: str = ""
    aim: str = ""
    passed: bool | None = None
    note: str = ""

    def limited(self, floor: float | None, factor: float) -> "Line":
        """The line with an aim: at most `factor` times `floor`; none without a floor."""
        if self.value is None or floor is None:
            return self
        most = factor * floor
        aim = f"<= {most:.3g} {self.unit}" + (f" ({self.value / floor:.2f} x floor)" if factor != 1 else "")
        return dataclasses.replace(self, aim=aim, passed=self.value <= most)

    def at_least(self, least: float) -> "Line":
        """The line with an aim: no less than `least`."""
        return dataclasses.replace(self, aim=f">= {least:.3g}", passed=(self.value or 0) >= least)


@dataclass(frozen=True, slots=True)
class Settings:
    """How to check. `folder` is where models and bundles are made; `seconds` is how long each comparison takes turns."""

    folder: Path
    provider: str = "cuda"
    tiny: bool = False
    compile: bool = True
    seconds: float = 4.0
    threads: int = dataclasses.field(default_factory=lambda: len(os.sched_getaffinity(0)))

    @property
    def device(self) -> str:
        """torch's: "cuda" or "cpu"."""
        return "cuda" if self.provider == "cuda" else "cpu"

    @property
    def precision(self) -> str:
        """That of the bundles."""
        return "fp16" if self.device == "cuda" else "fp32"

    @property
    def dtype(self) -> Any:
        """The same, for torch."""
        import torch

        return torch.float16 if self.precision == "fp16" else torch.float32

    @property
    def least_psnr(self) -> float:
        """The decibels that a picture in this precision needs against fp32, as at an export."""
        return 35.0 if self.precision == "fp16" else 50.0

    @property
    def synchronize(self) -> Callable[[], None]:
        """Waits for the device."""
        from img2img_server.pipelines.measuring import synchronizer

        return synchronizer((self.provider,))

    def floor(self, name: str) -> float | None:
        """One of FLOORS; None for tiny models and CPUs, of which nothing is known."""
        return FLOORS[name] if name in FLOORS and self.device == "cuda" and not self.tiny else None

    def kind(self, model: str) -> str:
        """The name in bench_models.MODELS of "sd15" or "sdxl"."""
        return "tiny" if self.tiny else model

    def side(self, model: str) -> int:
        """Pixels of a side of the model's pictures."""
        return 64 if self.tiny else {"sd15": 512, "sdxl": 1024}[model]

    def bundle(self, model: str) -> Path:
        """Where the model's bundle is."""
        return self.folder / f"{model}-bundle"

    def weights(self, model: str) -> Path:
        """Where the model is, as diffusers saves it."""
        return self.folder / f"{model}-weights"

    def words(self) -> list[str]:
        """The flags that make the same settings again."""
        words = ["--folder", str(self.folder), "--provider", self.provider, "--seconds", str(self.seconds)]
        words += ["--threads", str(self.threads)]
        return words + ["--tiny"] * self.tiny + ["--no-compile"] * (not self.compile)
