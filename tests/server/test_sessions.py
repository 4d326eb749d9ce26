"""The provider of a graph is the requested one, or an error. Options for GPUs are built here, not run."""

import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from img2img_server.bundle.manifest import read_manifest
from img2img_server.errors import BundleError
from img2img_server.runtime import loader
from img2img_server.runtime.common import cpu
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from img2img_server.runtime.onnx import providers
from img2img_server.runtime.onnx.providers import FULL_NAMES, Probe, probe
from img2img_server.runtime.onnx.sessions import SessionOptions, _session_options, describe, open_session, provider_list
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument


@pytest.mark.parametrize("provider", ["cuda", "openvino"])
def test_missing_provider_is_an_error(provider: str, bundle: Callable[[str], Path]) -> None:
    if not probe(provider).problem:
        pytest.skip(f"this machine has {provider}")
    for name in ("demo", "kandinsky22"):
        with pytest.raises(BundleError, match=f"'{provider}'"):
            load_pipeline(bundle(name), read_manifest(bundle(name)), Execution(provider))


def test_pytorch_below_float32_needs_the_accuracy_check(
    bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = bundle("sana-sprint")  # Made before the fakes are installed, since other tests share it.
    monkeypatch.setattr(loader, "choose_dtype", lambda device, execution: torch.bfloat16)
    with caplog.at_level(logging.INFO):
        pipeline = load_pipeline(folder, replace(read_manifest(folder), references=()), Execution("cpu"))
    assert pipeline.engine == "torch:cpu"
    assert [word for word in ("torch.bfloat16", "torch.float32") if word in caplog.text] == ["torch.bfloat16", "torch.float32"]
    assert "computes in fp32 and not in bf16: the bundle has no reference images" in caplog.text


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_session_that_falls_back_to_the_cpu_is_an_error(
    provider: str, bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake ONNX Runtime that lists all providers, and a probe that finds no problem: only the session shows which one it
    got."""
    if not probe(provider).problem:
        pytest.skip(f"this machine has {provider}")
    folder = bundle("demo")  # Made before the fakes are installed, since other tests share it.
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(FULL_NAMES.values()))
    monkeypatch.setattr(providers, "probe", lambda name: Probe(name, problem="" if name == provider else "not faked"))
    with pytest.raises(BundleError, match="was to run on"):
        open_session(folder / "unet" / "model.onnx", SessionOptions(provider))
    with pytest.raises(BundleError, match="was to run on"):
        load_pipeline(folder, read_manifest(folder), Execution(provider))


def test_gpu_provider_lists_end_with_the_cpu() -> None:
    for provider, names in (("cuda", ["cuda", "cpu"]), ("tensorrt", ["tensorrt", "cuda", "cpu"])):
        options = SessionOptions(provider, provider_options=(("device_id", "1"),))
        listed = provider_list(options)
        assert [name for name, _ in listed] == [FULL_NAMES[name] for name in names]
        assert listed[0][1]["device_id"] == "1"
        assert dict(listed)["CUDAExecutionProvider"]["cudnn_conv_algo_search"] == "HEURISTIC"
    asked = SessionOptions("cuda", provider_options=(("cudnn_conv_algo_search", "EXHAUSTIVE"),))
    assert provider_list(asked)[0][1] == {"cudnn_conv_algo_search": "EXHAUSTIVE"}


def test_session_reports_its_providers(bundle: Callable[[str], Path]) -> None:
    session = open_session(bundle("demo") / "vae_decoder" / "model.onnx", SessionOptions())
    assert session.get_providers() == ["CPUExecutionProvider"]


def test_describe_counts_nodes_per_provider(bundle: Callable[[str], Path]) -> None:
    nodes = describe(open_session(bundle("demo") / "vae_decoder" / "model.onnx", SessionOptions()))
    assert list(nodes) == ["cpu"]
    assert nodes["cpu"] > 50
    assert describe(object()) == {}


def test_static_session_accepts_only_its_size(bundle: Callable[[str], Path]) -> None:
    graph = bundle("demo") / "vae_decoder" / "model.onnx"
    sizes = (("batch_size", 1), ("latent_height", 8), ("latent_width", 6))
    session = open_session(graph, SessionOptions(dimensions=sizes))
    assert session.get_inputs()[0].shape == [1, 16, 8, 6]
    latents = np.random.default_rng(0).standard_normal((1, 16, 8, 6), dtype=np.float32)
    (fixed,), (free,) = (item.run(None, {"latent_sample": latents}) for item in (session, open_session(graph, SessionOptions())))
    np.testing.assert_allclose(fixed, free, rtol=1e-4, atol=1e-4)
    with pytest.raises(InvalidArgument, match="Got: 16"):
        session.run(None, {"latent_sample": np.zeros((1, 16, 16, 6), np.float32)})


def test_the_log_has_a_line_for_each_component(bundle: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        load_pipeline(bundle("demo"), read_manifest(bundle("demo")), Execution(threads=1))
    lines = [record.getMessage() for record in caplog.records if record.name.endswith("placement")]
    names = ["text_encoder", "unet", "vae_encoder", "vae_decoder"]
    assert sorted(line.split()[1] for line in lines) == sorted(names)
    better = [probe(name) for name in ("tensorrt", "cuda", "openvino") if probe(name).problem]
    for line in lines:
        assert re.search(r"runs \d+ nodes on \w+.* in fp32, 1 threads", line)
        assert all(str(item) in line for item in better)


def test_cpu_sessions_share_an_arena_without_weights() -> None:
    """A further model then takes little more than its weights, and gives them back."""
    shared = _session_options(SessionOptions())
    for entry in ("session.use_env_allocators", "session.use_device_allocator_for_initializers"):
        assert shared.get_session_config_entry(entry) == "1"
        for other in (SessionOptions(lean=True), SessionOptions("cuda")):
            with pytest.raises(RuntimeError, match=entry):
                _session_options(other).get_session_config_entry(entry)


def test_lean_session_gives_the_same_result(bundle: Callable[[str], Path]) -> None:
    graph = bundle("demo") / "vae_decoder" / "model.onnx"
    latents = np.random.default_rng(0).standard_normal((1, 16, 8, 8), dtype=np.float32)
    (usual,), (lean,) = (
        open_session(graph, SessionOptions(lean=lean)).run(None, {"latent_sample": latents}) for lean in (False, True)
    )
    np.testing.assert_allclose(lean, usual, rtol=1e-4, atol=1e-4)


def test_unreadable_graph_is_a_bundle_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match="does not open"):
        open_session(tmp_path / "model.onnx", SessionOptions())


def test_unknown_pipeline_class_or_missing_file_is_a_bundle_error(tmp_path: Path, bundle: Callable[[str], Path]) -> None:
    manifest = read_manifest(bundle("demo"))
    with pytest.raises(BundleError, match="NoSuchPipeline"):
        load_pipeline(bundle("demo"), replace(manifest, pipeline_class="NoSuchPipeline"), Execution("cpu"))
    broken = tmp_path / "broken"
    shutil.copytree(bundle("demo"), broken)
    (broken / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(BundleError, match="does not load"):
        load_pipeline(broken, manifest, Execution("cpu"))


@pytest.mark.parametrize(
    ("flags", "precise"),
    [
        ("fpu avx2", True),
        ("fpu avx512f avx512bw", True),
        ("fpu avx512_vnni", False),
        ("fpu avx2 avx_vnni", False),
        ("amx_int8", False),
    ],
)
def test_int8_sums_do_not_overflow_on_cpus_without_vnni(
    flags: str, precise: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: {flags}\n", encoding="utf-8")
    exact = cpu.sums_int8_exactly(tmp_path / "cpuinfo")
    monkeypatch.setattr(cpu, "sums_int8_exactly", lambda: exact)
    options = _session_options(SessionOptions())
    key = "session.x64quantprecision"
    try:
        value = options.get_session_config_entry(key)
    except RuntimeError:
        value = ""
    assert value == ("1" if precise else "")
