"""The parts of a Stable Diffusion model as units of work to time, by provider. Heavy imports: only for `bench_providers`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from img2img_server.runtime.onnx.runners import HostRunner, Runner
from img2img_server.runtime.onnx.sessions import SessionOptions, open_session
from img2img_server.runtime.providers import openvino
from transformers import CLIPTextModel

Feed = Mapping[str, torch.Tensor]


@dataclass(slots=True, eq=False)
class Session:
    """A graph in a session of the server. `output` is the first output of the last run."""

    runner: Runner
    feed: Feed
    output: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    def ready(self) -> None:
        """Does nothing."""

    def run(self) -> None:
        """Makes one call."""
        self.output = self.runner.run(self.feed)[0]

    def close(self) -> None:
        """Does nothing."""


@dataclass(slots=True, eq=False)
class Module:
    """The same part in PyTorch, of `dtype`, channels last."""

    component: str
    module: Any
    feed: Feed
    dtype: torch.dtype
    threads: int
    output: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    def ready(self) -> None:
        """Does nothing."""

    def run(self) -> None:
        """Makes one call."""
        torch.set_num_threads(self.threads)
        given = {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in self.feed.items()}
        with torch.inference_mode():
            if self.component == "text_encoder":
                output = self.module(given["input_ids"]).last_hidden_state
            elif self.component == "vae_encoder":
                output = self.module.encode(given["sample"]).latent_dist.parameters
            elif self.component == "vae_decoder":
                output = self.module.decode(given["latent_sample"]).sample
            else:
                sample = given["sample"].to(memory_format=torch.channels_last)
                output = self.module(sample, self.feed["timestep"], given["encoder_hidden_states"]).sample
        self.output = output.float()

    def close(self) -> None:
        """Does nothing."""


Work = Session | Module


def feed_of(component: str, model: Path, size: int) -> dict[str, torch.Tensor]:
    """Random inputs: two rows of the UNet and the text encoder, one image of the VAE; `size` is in pixels."""
    torch.manual_seed(0)
    width = UNet2DConditionModel.load_config(model / "unet")["cross_attention_dim"]
    side = size // 8
    tokens = CLIPTextModel.config_class.from_pretrained(model / "text_encoder").max_position_embeddings
    feeds = {
        "unet": {
            "sample": torch.randn(2, 4, side, side),
            "timestep": torch.tensor([801.0, 401.0]),
            "encoder_hidden_states": torch.randn(2, tokens, width),
        },
        "vae_encoder": {"sample": torch.rand(1, 3, size, size) * 2 - 1},
        "vae_decoder": {"latent_sample": torch.randn(1, 4, side, side)},
        "text_encoder": {"input_ids": torch.randint(0, 100, (2, tokens))},
    }
    return feeds[component]


def works_of(
    component: str, feed: Feed, model: Path, bundles: Mapping[str, Path], variants: Sequence[str], threads: int
) -> dict[str, Work]:
    """The part with each of `variants`. The VAE encoder of the int8 bundle is skipped: it equals that of the fp32 bundle."""
    works: dict[str, Work] = {}
    for variant in variants:
        if variant == "int8" and component == "vae_encoder":
            continue
        if variant.startswith("torch"):
            dtype = torch.bfloat16 if variant.endswith("bf16") else torch.float32
            works[variant] = Module(component, _module(component, model, dtype), feed, dtype, threads)
            continue
        graph = bundles["int8" if variant == "int8" else "fp32"] / component / "model.onnx"
        works[variant] = Session(_runner(variant, graph, feed, threads), feed)
        if isinstance(works[variant], Session) and component == "text_encoder":
            works[variant].feed = {"input_ids": feed["input_ids"].to(_kind(works[variant]))}
    return works


def error_of(reference: Work, work: Work) -> float:
    """The relative L2 error of the last outputs."""
    return float((work.output - reference.output).norm() / reference.output.norm())


def _runner(variant: str, graph: Path, feed: Feed, threads: int) -> Runner:
    """A graph on the CPU provider, or compiled by OpenVINO, for the shapes of `feed` or for any."""
    if not variant.startswith("openvino"):
        return HostRunner(open_session(graph, SessionOptions("cpu", threads)))
    compiler = openvino.Compiler(threads, "bf16" if variant.endswith("bf16") else "f32")
    return compiler(graph, {name: tuple(value.shape) for name, value in feed.items()} if "static" in variant else None)


def _kind(work: Work) -> torch.dtype:
    assert isinstance(work, Session), "only graphs have types of their own"
    return torch.int32 if work.runner.inputs[0].type == "tensor(int32)" else torch.int64


def _module(component: str, model: Path, dtype: torch.dtype) -> Any:
    if component == "text_encoder":
        return CLIPTextModel.from_pretrained(model / component, torch_dtype=dtype).eval()
    kind = UNet2DConditionModel if component == "unet" else AutoencoderKL
    folder = component if component == "unet" else "vae"
    return kind.from_pretrained(model / folder, torch_dtype=dtype).eval().to(memory_format=torch.channels_last)
