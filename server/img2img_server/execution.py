"""How models are to be run on this machine: the settings of an operator, as values. What is really there, pipelines find out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PROVIDERS = ("tensorrt", "cuda", "openvino", "cpu")
"""The execution providers that can be asked for by name, best first."""

Arithmetic = Literal["auto", "fp32"]


@dataclass(frozen=True, slots=True)
class Bucket:
    """A common shape of calls: pictures of `width` x `height` pixels, `rows` of them in a call of the model.

    For such a shape a provider may keep what it prepared beforehand: a session of fixed shapes, a CUDA graph, a TensorRT profile.
    """

    width: int
    height: int
    rows: int

    @classmethod
    def parse(cls, text: str) -> "Bucket":
        """Reads "512x512:2", 512 wide, two rows. Raises ValueError."""
        size, colon, rows = text.partition(":")
        width, times, height = size.partition("x")
        numbers = (width, height, rows if colon else "2")
        if not times or not all(number.isascii() and number.isdigit() and int(number) > 0 for number in numbers):
            raise ValueError(f"'{text}' is no WIDTHxHEIGHT:ROWS, such as 512x512:2")
        return cls(*map(int, numbers))

    def __str__(self) -> str:
        return f"{self.width}x{self.height}:{self.rows}"


@dataclass(frozen=True, slots=True)
class Execution:
    """How to run a bundle.

    `provider` is "auto" or one of PROVIDERS. `threads` are the CPU threads of one call, None for the cores there are.
    `arithmetic` "auto" lets a provider compute in less than the bundle's precision (bfloat16 on a CPU with AMX, say) where its
    pictures still pass, "fp32" never. `buckets` are the shapes to prepare for; None leaves that to the provider, () is none.
    `gpu_memory` bounds ONNX Runtime's arena in bytes, None for no bound. `cuda_graphs` records calls of common shapes and
    replays them. `compile` runs torch modules through torch.compile. `cache` is where built engines are kept.
    """

    provider: str = "auto"
    threads: int | None = None
    arithmetic: Arithmetic = "auto"
    buckets: tuple[Bucket, ...] | None = None
    gpu_memory: int | None = None
    cuda_graphs: bool = True
    compile: bool = False
    cache: Path | None = None

    def __post_init__(self) -> None:
        if self.provider not in ("auto", *PROVIDERS):
            raise ValueError(f"provider is '{self.provider}', known are auto, {', '.join(PROVIDERS)}")
        for name in ("threads", "gpu_memory"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, the least is 1")
