"""How models are to be run on this machine: the settings of an operator, as values. What is really there, pipelines find out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from img2img_server.settings.setting import check, setting

PROVIDERS = ("tensorrt", "cuda", "openvino", "cpu")
"""The execution providers that can be asked for by name, best first."""

Arithmetic = Literal["auto", "fp32"]


@dataclass(frozen=True, slots=True)
class Bucket:
    """A common shape of calls: images of `width` x `height` pixels, `rows` of them in a call of the model.

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


def parse_buckets(text: str) -> tuple[Bucket, ...]:
    """Reads "512x512:2,768x512:4"; "none" is none. Raises ValueError."""
    return () if text == "none" else tuple(map(Bucket.parse, text.split(",")))


def write_buckets(buckets: tuple[Bucket, ...]) -> str:
    """What `parse_buckets` reads as these."""
    return ",".join(map(str, buckets)) or "none"


@dataclass(frozen=True, slots=True)
class Execution:
    """How to run a bundle.

    `provider` is "auto" or one of PROVIDERS. `threads` are the CPU threads of one call, None for the cores there are.
    `arithmetic` "auto" lets a provider compute in less than the bundle's precision (bfloat16 on a CPU with AMX, say) where its
    images still pass, "fp32" never. `buckets` are the shapes to prepare for; None leaves that to the provider, () is none.
    `gpu_memory` bounds ONNX Runtime's arena in bytes, None for no bound. `cuda_graphs` records calls of common shapes and
    replays them. `vae_memory` bounds one call of a VAE in bytes, by estimate; None leaves that to common/vae.py. `compile` runs
    torch modules through torch.compile. `cache` is where built engines are kept.
    """

    provider: str = setting(
        "auto",
        "execution provider for ONNX graphs. auto takes the best one that works on this machine, and the log says why a better "
        "one was not used; a provider that is set by name and does not work is an error at start",
        choices=("auto", *PROVIDERS),
    )
    threads: int | None = setting(
        None,
        "CPU threads per model call (default: one for each physical core that this process may use)",
        metavar="N",
        least=1,
    )
    arithmetic: Arithmetic = setting(
        "auto",
        "auto: compute in bfloat16 or float16 if that is faster and the model's reference images still pass. "
        "fp32: never below the bundle's own precision",
        choices=("auto", "fp32"),
    )
    buckets: tuple[Bucket, ...] | None = setting(
        None,
        "common sizes to optimize for, in pixels, with the rows of a call: 512x512:2 is one image of 512 x 512 with guidance. "
        "Each costs memory; other sizes run slower; none disables it (default: the model's own size with 2 rows)",
        metavar="WxH:ROWS[,...]",
        parse=parse_buckets,
        write=write_buckets,
    )
    gpu_memory: int | None = setting(
        None, "maximum GPU memory of each ONNX Runtime session (default: no bound)", metavar="BYTES", least=1
    )
    cuda_graphs: bool = setting(
        True, "record model calls of common sizes as CUDA graphs and replay them, instead of launching each kernel"
    )
    compile: bool = setting(
        False, "use torch.compile for models that run in PyTorch: faster steps, but start takes minutes longer"
    )
    vae_memory: int | None = setting(
        None,
        "maximum memory of one VAE call, as estimated: larger batches are divided, larger images are computed in overlapping "
        "tiles (default: a quarter of the memory of the GPU or the machine)",
        metavar="BYTES",
        least=1,
    )
    cache: Path | None = setting(
        None,
        "folder for built TensorRT engines and measured costs (default: ~/.cache/img2img/engines)",
        metavar="DIR",
        name="engine_cache",
    )

    def __post_init__(self) -> None:
        check(self)
