"""How near an image must be to the exact one: the image of the same request in which no work is skipped."""

from dataclasses import dataclass
from typing import Literal, get_args

Level = Literal["exact", "high", "fast"]
LEVELS: tuple[Level, ...] = get_args(Level)
MAX_PSNR_DB = 100.0
"""The largest bound in decibels: above 98 dB, images of eight bits are all but equal."""

_LEVEL_PSNR_DB: dict[Level, float] = {"high": 35.0, "fast": 30.0}
"""The bound of each level but "exact", in decibels."""


@dataclass(frozen=True, slots=True)
class Fidelity:
    """A bound: a `level`, or the least PSNR in decibels, or the least SSIM. The default is the exact image."""

    level: Level | None = "exact"
    min_psnr_db: float | None = None
    min_ssim: float | None = None

    @property
    def is_exact(self) -> bool:
        """Whether no work may be skipped."""
        return self.level == "exact"

    @property
    def psnr_db(self) -> float:
        """The least PSNR in decibels, 0 for no bound."""
        if self.min_psnr_db is not None:
            return self.min_psnr_db
        return 0.0 if self.level is None else _LEVEL_PSNR_DB[self.level]

    @property
    def ssim(self) -> float:
        """The least SSIM, 0 for no bound."""
        return self.min_ssim or 0.0

    def __str__(self) -> str:
        """The text that `api/fidelity.py` reads: a level, decibels ("32 dB") or an SSIM ("0.95")."""
        if self.level is not None:
            return self.level
        return f"{self.min_psnr_db:.12g} dB" if self.min_psnr_db is not None else f"{self.min_ssim:.12g}"


EXACT = Fidelity()
"""No work is skipped."""
