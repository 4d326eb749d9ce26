"""The operator's settings for running models. Whether this machine supports them is checked when a pipeline is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from img2img_server.bundle.manifest import is_text_encoder
from img2img_server.settings.setting import check, setting

PROVIDERS = ("tensorrt", "cuda", "openvino", "cpu")
"""Names of execution providers, best first."""

Arithmetic = Literal["auto", "fp32"]
Offload = Literal["none", "text-encoders"]


@dataclass(frozen=True, slots=True)
class Bucket:
    """A common shape of calls: images of `width` x `height` pixels, `rows` of them in a call of the model.

    A provider can prepare for such a shape in advance: a session of fixed shapes, a CUDA graph, a TensorRT profile.
    """

    width: int
    height: int
    rows: int

    @classmethod
    def parse(cls, text: str) -> "Bucket":
        """Parses "512x512:2" (width x height : rows; rows default to 2). Raises ValueError."""
        size, colon, rows = text.partition(":")
        width, times, height = size.partition("x")
        numbers = (width, height, rows if colon else "2")
        if not times or not all(number.isascii() and number.isdigit() and int(number) > 0 for number in numbers):
            raise ValueError(f"'{text}' is not WIDTHxHEIGHT:ROWS, such as 512x512:2")
        return cls(*map(int, numbers))

    def __str__(self) -> str:
        return f"{self.width}x{self.height}:{self.rows}"


def parse_buckets(text: str) -> tuple[Bucket, ...]:
    """Parses "512x512:2,768x512:4"; "none" gives (). Raises ValueError."""
    return () if text == "none" else tuple(map(Bucket.parse, text.split(",")))


def write_buckets(buckets: tuple[Bucket, ...]) -> str:
    """The inverse of `parse_buckets`."""
    return ",".join(map(str, buckets)) or "none"


@dataclass(frozen=True, slots=True)
class Execution:
    """How to run a bundle.

    `provider` is "auto" or one of PROVIDERS. `threads` is the number of CPU threads of one call, None for the number of cores.
    With `arithmetic` "auto" a provider may compute in lower precision than the bundle's (such as bfloat16 on a CPU that has it)
    if the reference images still pass; with "fp32" it may not. `buckets` are the shapes to prepare for, None for the provider's
    default, () for none. `gpu_memory` bounds ONNX Runtime's arena in bytes, None for no bound. `cuda_graphs` records calls of
    common shapes and replays them. `vae_memory` bounds the estimated memory of one VAE call in bytes, None for the default of
    common/vae.py. With `offload` "text-encoders" their weights stay in host memory, if the model runs on a GPU. `compile` runs
    torch modules through torch.compile. `cache` is the folder of built engines, compiled graphs and measurements.
    """

    provider: str = setting(
        "auto",
        "execution provider for ONNX graphs. auto takes the best one that works on this machine; on a CPU it measures OpenVINO, "
        "if it is installed, against ONNX Runtime once for each model, and keeps the faster one. The log says why a better one "
        "was not used; a provider that is set by name and does not work is an error at start",
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
        None, "maximum GPU memory of each ONNX Runtime session (default: no limit)", metavar="BYTES", least=1
    )
    cuda_graphs: bool = setting(
        True, "record model calls of common sizes as CUDA graphs and replay them, instead of launching each kernel"
    )
    offload: Offload = setting(
        "none",
        "text-encoders: keep the weights of text encoders in host memory, for a GPU that cannot hold them and the denoiser. Text "
        "encoders that were exported to ONNX then run on the CPU. Text encoders in PyTorch run on the GPU: their layers are "
        "copied there one by one each time a new text is encoded",
        choices=("none", "text-encoders"),
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
        "folder for built TensorRT engines, graphs compiled by OpenVINO and measurements (default: ~/.cache/img2img/engines)",
        metavar="DIR",
        name="engine_cache",
    )

    def __post_init__(self) -> None:
        check(self)

    def offloads(self, component: str) -> bool:
        """Whether the weights of a component, or of a graph of it, stay in host memory."""
        return self.offload == "text-encoders" and is_text_encoder(component)
