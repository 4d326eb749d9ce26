"""Weights in half precision compute in fp32, as a copy in fp32 does, in modules that read a weight's type, too."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from covering import nightly_but
from diffusers.models.transformers.transformer_z_image import TimestepEmbedder
from img2img_export.convert.models import Loader, modules
from img2img_export.read.checkpoint import INDEX_NAME, read_index, read_layout
from img2img_export.verify import images
from img2img_server.bundle.manifest import read_manifest
from img2img_server.runtime import loader
from img2img_server.runtime.common.fp32_compute import compute_in_fp32, computing_in_fp32
from img2img_server.runtime.execution import Execution
from tiny_parts import t5_encoder, t5_tokenizer
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionPatchEmbed

Get = Callable[[str], Path]


def t5() -> tuple[torch.nn.Module, Any]:
    return t5_encoder(t5_tokenizer(16), 32), torch.arange(12)[None]


def patches() -> tuple[torch.nn.Module, Any]:
    return Qwen2_5_VisionPatchEmbed(patch_size=4, embed_dim=8), torch.randn(5, 3 * 2 * 4 * 4)


def timesteps() -> tuple[torch.nn.Module, Any]:
    return TimestepEmbedder(32, frequency_embedding_size=16), torch.tensor([0.3, 712.5])


def outcome(found: Any) -> torch.Tensor:
    return found if isinstance(found, torch.Tensor) else found[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("build", [t5, patches, timesteps])
def test_result_is_that_of_a_copy_in_fp32(build: Callable[[], tuple[torch.nn.Module, Any]], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module, given = build()
    module.to(dtype).eval()
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        expected = outcome(copy.deepcopy(module).float()(given))
        with computing_in_fp32(module):
            found = outcome(module(given))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert all(torch.equal(value, weights[name]) and value.dtype == dtype for name, value in module.state_dict().items())


def test_failure_leaves_the_weights_as_they_were() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(5, 4)).half()
    with computing_in_fp32(module), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        module(torch.ones(1, 4))
    assert {value.dtype for value in module.state_dict().values()} == {torch.float16}
    with pytest.raises(RuntimeError, match="dtype"):
        module(torch.ones(1, 4))


def test_moved_weights_are_used() -> None:
    """For example after `.to(device)`."""
    module = torch.nn.Linear(4, 4).half()
    compute_in_fp32(module)
    module.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.float16))
    assert torch.equal(module(torch.ones(1, 4)), module.bias.float()[None])


@pytest.mark.parametrize(
    "name", nightly_but(["qwenimage-edit", "sd3", "flux-dev", "zimage", "klein", "kontext"], "sd3", "zimage")
)
def test_bf16_pipeline_matches_its_fp32_copy(name: str, tiny_model: Get) -> None:
    directory = tiny_model(name)
    pipe = Loader(directory, read_layout(read_index(directory / INDEX_NAME))).pipeline(torch.bfloat16)
    case = images.image_cases(pipe, "")[0]
    with computing_in_fp32(*modules(pipe).values()):
        (found,) = images.make_references(pipe, [case])
    for part in modules(pipe).values():
        part.float()
    (expected,) = images.make_references(pipe, [case])
    assert np.array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("compiles", [False, True])
def test_hybrids_modules_keep_their_stored_precision_unless_compiled(
    compiles: bool, bundle: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "compile_modules", lambda pipe, pipeline: None)
    path = bundle("klein:fp16:int4+hybrid")
    pipeline: Any = loader.load_pipeline(path, read_manifest(path), Execution("cpu", compile=compiles))
    pipe = pipeline._pipe
    values = (value for part in (pipe.text_encoder, pipe.vae) for value in part.parameters())
    kinds = {value.dtype for value in values if value.is_floating_point()}  # int4 is stored in integers
    assert kinds == {torch.float32 if compiles else torch.float16}
    assert pipe.text_encoder.dtype == pipe.vae.dtype == torch.float32
