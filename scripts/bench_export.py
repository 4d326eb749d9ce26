"""What an export of real size takes: wall time and peak memory of `img2img export`, on models with random weights."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

_BENCH = Path(".bench")
_TOKENIZER = Path("demo/model/tokenizer")
_PAUSE = 0.05
_CASES = {"sd15-fp32": ("sd15", "fp32"), "sd15-fp16": ("sd15", "fp16"), "sdxl-unet-fp16": ("sdxl-unet", "fp16")}
"""What can be measured: the model, stored in the precision that it is exported in."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What a stage of an export took: seconds, and the peaks of memory as in `Result`."""

    name: str
    seconds: float
    resident: int
    own: int


@dataclass(frozen=True, slots=True)
class Result:
    """One export. Seconds; bytes; `resident` is the peak of all that was in memory, files that were mapped and could be let go
    of among it, `own` of what could not. `largest` is the largest graph's weights, `again` the same command's second time."""

    case: str
    seconds: float
    resident: int
    own: int
    largest: int
    bundle: int
    again: float
    stages: list[Stage]
    summary: str


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the settings."""
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(_CASES)} (default: all)")
    parser.add_argument(
        "--limit",
        type=float,
        metavar="F",
        help="run in a memory cgroup of F x the largest component's weights (root only): what is more is killed",
    )
    parser.add_argument("--keep", action="store_true", help="keep the bundles, in .bench/bundles")


def run(arguments: argparse.Namespace) -> int:
    """Makes the models, exports each in a process of its own, and prints a table. Needs up to 20 GB of disk."""
    results = []
    for case in arguments.cases or _CASES:
        model, precision = _CASES[case]
        results.append(_measure(case, _model(model, precision), precision, arguments))
        (_BENCH / f"export-{case}.json").write_text(json.dumps(asdict(results[-1]), indent=1) + "\n")
    table = Table(
        "export", "wall", "peak resident", "of it not mapped", "largest graph", "ratio", "bundle", "again", title="exports"
    )
    for result in results:
        sizes = [f"{value / 1e9:.2f} GB" for value in (result.resident, result.own, result.largest)]
        ratio = f"{result.resident / result.largest:.2f}"
        table.add_row(
            result.case, f"{result.seconds:.0f} s", *sizes, ratio, f"{result.bundle / 1e9:.2f} GB", f"{result.again:.1f} s"
        )
    Console(width=140).print(table)
    for result in results:
        parts = Table("stage", "seconds", "peak resident", "of it not mapped", title=result.case)
        for stage in result.stages:
            parts.add_row(stage.name, f"{stage.seconds:.0f}", f"{stage.resident / 1e9:.2f} GB", f"{stage.own / 1e9:.2f} GB")
        Console(width=140).print(parts)
        print(result.summary)
    return 0


def _measure(case: str, model: Path, precision: str, arguments: argparse.Namespace) -> Result:
    output = _BENCH / "bundles" / case
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "img2img_cli", "export", str(model), "--output", str(output), "--precision", precision]
    samples: list[tuple[float, int, int]] = []
    begun = time.monotonic()
    lines = _BENCH / f"export-{case}.jsonl"
    limit = _Limit(model, arguments.limit) if arguments.limit else None
    export = [*command, "--backend", "onnx", "--json"]
    with lines.open("w") as file, subprocess.Popen(export, stdout=file, preexec_fn=limit.enter if limit else None) as process:
        known = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                memory = known.memory_info()
            except psutil.NoSuchProcess:
                break
            samples.append((time.monotonic() - begun, memory.rss, memory.rss - memory.shared))
            time.sleep(_PAUSE)
    seconds = time.monotonic() - begun
    events = [json.loads(line) for line in lines.read_text().splitlines()]
    if process.returncode == -signal.SIGKILL:
        raise SystemExit(f"{case}: killed")
    if process.returncode:
        raise SystemExit(f"{case}: {events[-1].get('message')}")
    begins = [(event["text"], event["seconds"]) for event in events if event["event"] == "stage"]
    ends = [*(begin for _, begin in begins[1:]), seconds]
    stages = [
        Stage(name, end - start, *_peaks([sample for sample in samples if start <= sample[0] <= end]))
        for (name, start), end in zip(begins, ends, strict=True)
    ]
    largest = max(path.stat().st_size for path in output.glob("*/model.onnx_data"))
    bundle = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    summary = next(event for event in events if event["event"] == "result")
    begun = time.monotonic()
    subprocess.run([*command, "--backend", "onnx"], check=True, stdout=subprocess.DEVNULL)
    again = time.monotonic() - begun
    if not arguments.keep:
        shutil.rmtree(output)
    return Result(
        case, seconds, *_peaks(samples), largest, bundle, again, stages, json.dumps(summary["verification"]["pictures"])
    )


class _Limit:
    """A memory cgroup of version 1 or 2, without swap, of `factor` times a model's largest component."""

    def __init__(self, model: Path, factor: float) -> None:
        largest = max(sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in model.glob("*/"))
        old = Path("/sys/fs/cgroup/memory")
        self._group = (old if old.is_dir() else Path("/sys/fs/cgroup")) / "img2img-bench"
        self._group.mkdir(exist_ok=True)
        name = "memory.limit_in_bytes" if old.is_dir() else "memory.max"
        (self._group / name).write_text(str(round(factor * largest)))
        # Pages of the files that are in memory already would be on somebody else's account.
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
        print(f"memory is limited to {factor * largest / 1e9:.2f} GB", flush=True)

    def enter(self) -> None:
        """Moves the calling process into it."""
        (self._group / "cgroup.procs").write_text(str(os.getpid()))


def _peaks(samples: list[tuple[float, int, int]]) -> tuple[int, int]:
    return max((sample[1] for sample in samples), default=0), max((sample[2] for sample in samples), default=0)


def _model(name: str, precision: str) -> Path:
    """The directory of a model, made once: the same random numbers each time."""
    directory = _BENCH / "models" / f"{name}-{precision}"
    if not (directory / "model_index.json").is_file():
        import torch

        print(f"making {directory}", flush=True)
        torch.manual_seed(0)
        with torch.no_grad():
            pipeline = _MODELS[name]()
            pipeline.to({"fp32": torch.float32, "fp16": torch.float16}[precision])
            pipeline.save_pretrained(directory, safe_serialization=True)
    return directory


def _sd15() -> Any:
    """Stable Diffusion 1.5 in every size: 860 M parameters of UNet, 123 M of text encoder, 84 M of VAE."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        attention_head_dim=8,
        cross_attention_dim=768,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    return StableDiffusionPipeline(
        vae=_vae(0.18215, (128, 256, 512, 512)),
        text_encoder=CLIPTextModel(_text(768, 12, 12, "quick_gelu")).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(_TOKENIZER),
        unet=unet.eval(),
        scheduler=PNDMScheduler(**_BETAS, skip_prk_steps=True, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl_unet() -> Any:
    """SDXL's UNet, 2.6 G parameters, between text encoders of its widths but of two layers, and a small VAE."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    with _default(torch.float16):  # 10 GB otherwise, before it is saved in half of that
        unet = UNet2DConditionModel(
            sample_size=16,  # so that small pictures are compared: its weights are those of any size
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=[5, 10, 20],
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    tokenizer = CLIPTokenizer.from_pretrained(_TOKENIZER)
    return StableDiffusionXLPipeline(
        vae=_vae(0.13025, (32, 64, 64, 64)),
        text_encoder=CLIPTextModel(_text(768, 2, 12, "quick_gelu")).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_text(1280, 2, 20, "gelu")).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(**_BETAS, timestep_spacing="leading", steps_offset=1),
    )


_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_MODELS: dict[str, Callable[[], Any]] = {"sd15": _sd15, "sdxl-unet": _sdxl_unet}


def _default(dtype: Any) -> Any:
    """New parameters are of type `dtype`, within."""
    import contextlib

    import torch

    @contextlib.contextmanager
    def changed() -> Any:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    return changed()


def _text(width: int, layers: int, heads: int, activation: str) -> Any:
    from transformers import CLIPTextConfig, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(_TOKENIZER)
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=activation,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _vae(scaling_factor: float, channels: tuple[int, ...]) -> Any:
    """Its colours are made as strong as a picture's: random weights alone give grey, on which nothing can be compared."""
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
        scaling_factor=scaling_factor,
        force_upcast=False,
    ).eval()
    latents = torch.randn(1, 4, 16, 16) / scaling_factor
    vae.decoder.conv_out.weight.mul_(0.4 / vae.decode(latents).sample.std())
    pixels = torch.rand(1, 3, 128, 128) * 2 - 1
    vae.quant_conv.weight[:4].div_(vae.encode(pixels).latent_dist.mean.std() * scaling_factor)
    vae.quant_conv.bias[4:].sub_(6)
    return vae
