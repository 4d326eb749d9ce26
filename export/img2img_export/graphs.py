"""PyTorch pipeline -> one ONNX graph for each component, through optimum.

Optimum's own UNet graph takes one timestep for the whole batch, and only latents that are a multiple of 2^(levels - 1):
tracing at an even size freezes the branch of diffusers that hands the upsamplers their sizes. Both go away with other
dummy inputs: a timestep for each sample, and an odd size. Small dummies also make the export quicker.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from diffusers.utils import logging as diffusers_logging
from img2img_server.bundle import Component, TensorSpec
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph, RuntimeException
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoSuchKernel
from optimum.exporters.onnx import onnx_export_from_model
from optimum.exporters.onnx.model_configs import UNetOnnxConfig, VaeDecoderOnnxConfig, VaeEncoderOnnxConfig
from optimum.exporters.utils import get_diffusion_models_for_export

from img2img_export.errors import ExportError, first_line

GRAPH_NAME = "model.onnx"
COMPONENTS = ("text_encoder", "text_encoder_2", "unet", "vae_encoder", "vae_decoder")
"""Every component that a graph is made of, in the order in which a request meets them."""

_LATENT_SIZE = (33, 35)
_PICTURE_SIZE = (72, 88)
_SCHEDULE_LENGTH = 1000
_FAILURES = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, AssertionError, ImportError)
"""What optimum and torch's exporter raise for a model that they cannot export. A full disk is no such thing."""

RUNTIME_ERRORS = (Fail, InvalidArgument, InvalidGraph, NoSuchKernel, RuntimeException)
"""What ONNX Runtime raises for a graph or inputs that it cannot run. They have no base of their own."""


class BatchTimestepUNetConfig(UNetOnnxConfig):  # type: ignore[misc]
    """Optimum's UNet with `timestep` of shape [batch] (or [1], for all samples), traced at an odd size."""

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        """Optimum's inputs, their dynamic axes named by index; the timestep gets an axis of its own."""
        return {**super().inputs, "timestep": {0: "timestep_batch"}}

    def generate_dummy_inputs(self, framework: str = "pt", **kwargs: Any) -> dict[str, Any]:
        """Optimum's dummies, with the sample's size odd and timesteps of a schedule."""
        inputs: dict[str, Any] = super().generate_dummy_inputs(framework=framework, **kwargs)
        batch, channels, _, _ = inputs["sample"].shape
        inputs["sample"] = torch.rand(batch, channels, *_LATENT_SIZE, dtype=inputs["sample"].dtype)
        inputs["timestep"] = torch.randint(_SCHEDULE_LENGTH, (batch,)).to(inputs["timestep"].dtype)
        return inputs


class SmallVaeEncoderConfig(VaeEncoderOnnxConfig):  # type: ignore[misc]
    """Optimum's VAE encoder, traced on a small picture: the model's own size may be 1024 x 1024."""

    def generate_dummy_inputs(self, framework: str = "pt", **kwargs: Any) -> dict[str, Any]:
        """Optimum's dummies, with a small sample."""
        inputs: dict[str, Any] = super().generate_dummy_inputs(framework=framework, **kwargs)
        inputs["sample"] = inputs["sample"].new_empty(*inputs["sample"].shape[:2], *_PICTURE_SIZE).uniform_(-1, 1)
        return inputs


class SmallVaeDecoderConfig(VaeDecoderOnnxConfig):  # type: ignore[misc]
    """Optimum's VAE decoder, traced on small latents."""

    def generate_dummy_inputs(self, framework: str = "pt", **kwargs: Any) -> dict[str, Any]:
        """Optimum's dummies, with small latents."""
        inputs: dict[str, Any] = super().generate_dummy_inputs(framework=framework, **kwargs)
        latents = inputs["latent_sample"]
        inputs["latent_sample"] = latents.new_empty(*latents.shape[:2], 9, 11).normal_()
        return inputs


_CONFIGS = {"unet": BatchTimestepUNetConfig, "vae_encoder": SmallVaeEncoderConfig, "vae_decoder": SmallVaeDecoderConfig}


def export_graphs(pipeline: Any, bundle: Path) -> None:
    """Writes the graphs of a diffusers pipeline, its tokenizers, scheduler and configurations into `bundle`.

    Raises ExportError, in one line, where optimum or torch cannot export it.
    """
    try:
        with quiet():
            parts = get_diffusion_models_for_export(pipeline, float_dtype="fp32")
            configs = {
                name: kind(parts[name][0].config, task="semantic-segmentation", float_dtype="fp32")
                for name, kind in _CONFIGS.items()
            }
            onnx_export_from_model(
                pipeline,
                bundle,
                task="image-to-image",
                do_validation=False,
                no_post_process=True,
                custom_onnx_configs=configs,
            )
    except _FAILURES as error:
        raise ExportError(f"optimum cannot export it: {type(error).__name__}: {first_line(error)}") from error


def describe_graphs(bundle: Path) -> tuple[Component, ...]:
    """Reads the inputs, outputs, opset and precision of every graph in `bundle`."""
    return tuple(_describe(name, bundle / name / GRAPH_NAME) for name in COMPONENTS if (bundle / name / GRAPH_NAME).is_file())


def _describe(name: str, path: Path) -> Component:
    model = onnx.load(str(path), load_external_data=False)
    opset = next(item.version for item in model.opset_import if item.domain in ("", "ai.onnx"))
    kinds = {item.data_type for item in model.graph.initializer}
    half = {onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
    precision = next((word for kind, word in half.items() if kind in kinds), "fp32")
    return Component(name, precision, opset, _specs(model.graph.input), _specs(model.graph.output))


def _specs(values: Any) -> tuple[TensorSpec, ...]:
    specs = []
    for value in values:
        tensor = value.type.tensor_type
        shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
        specs.append(TensorSpec(value.name, str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape))
    return tuple(specs)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what optimum, torch's exporter and diffusers say about their own insides away from the person."""
    loggers = [logging.getLogger(name) for name in ("optimum", "transformers", "diffusers", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    diffusers_logging.disable_progress_bar()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers_logging.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
