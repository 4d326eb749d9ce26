"""Which provider runs a graph: asked for openly, or refused. The options of GPUs are built here, not run."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from img2img_server.bundle import read_manifest
from img2img_server.errors import BundleError
from img2img_server.execution import Execution
from img2img_server.pipelines.loader import load_pipeline
from img2img_server.pipelines.sessions import SessionOptions, open_session, provider_list, resolve_provider


def test_auto_takes_the_best_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_provider("auto") == "cpu"
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider", "CUDAExecutionProvider"])
    assert resolve_provider("auto") == "cuda"
    assert resolve_provider("cpu") == "cpu"


def test_a_provider_that_is_not_there_is_an_error(bundle: Callable[[str], Path]) -> None:
    with pytest.raises(BundleError, match="'cuda' is not in this ONNX Runtime, which has cpu"):
        resolve_provider("cuda")
    for name in ("demo", "kandinsky22"):
        with pytest.raises(BundleError, match="'cuda'"):
            load_pipeline(bundle(name), read_manifest(bundle(name)), Execution("cuda"))


def test_cuda_ends_with_the_cpu_for_what_it_lacks() -> None:
    names = [name for name, _ in provider_list(SessionOptions("cuda"))]
    assert names == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert dict(provider_list(SessionOptions("cuda")))["CUDAExecutionProvider"]["cudnn_conv_algo_search"] == "HEURISTIC"


def test_a_session_says_what_it_runs_on(bundle: Callable[[str], Path]) -> None:
    session = open_session(bundle("demo") / "vae_decoder" / "model.onnx", SessionOptions())
    assert session.get_providers() == ["CPUExecutionProvider"]


def test_a_lean_session_computes_the_same(bundle: Callable[[str], Path]) -> None:
    graph = bundle("demo") / "vae_decoder" / "model.onnx"
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8), dtype=np.float32)
    (usual,), (lean,) = (
        open_session(graph, SessionOptions(lean=lean)).run(None, {"latent_sample": latents}) for lean in (False, True)
    )
    np.testing.assert_allclose(lean, usual, rtol=1e-4, atol=1e-4)


def test_a_graph_that_does_not_open_is_a_bundle_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match="does not open"):
        open_session(tmp_path / "model.onnx", SessionOptions())


def test_a_bundle_of_another_world_is_a_bundle_error(tmp_path: Path, bundle: Callable[[str], Path]) -> None:
    manifest = read_manifest(bundle("demo"))
    with pytest.raises(BundleError, match="NoSuchPipeline"):
        load_pipeline(bundle("demo"), replace(manifest, pipeline_class="NoSuchPipeline"), Execution("cpu"))
    broken = tmp_path / "broken"
    shutil.copytree(bundle("demo"), broken)
    (broken / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(BundleError, match="does not load"):
        load_pipeline(broken, manifest, Execution("cpu"))
