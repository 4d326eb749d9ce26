"""Every graph of a bundle opens, runs and can be recorded with ONNX Runtime's CUDA provider, in every precision."""

import ctypes
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from covering import nightly_but
from fake_gpu import FakeGpu
from img2img_server.bundle.manifest import read_manifest
from img2img_server.engine.cache import Cache
from img2img_server.errors import BundleError
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from img2img_server.runtime.onnx import providers
from img2img_server.runtime.onnx.graph_sizes import Sizes
from img2img_server.runtime.onnx.placement import Placement
from img2img_server.runtime.onnx.providers import ProviderChoice, needed_libraries
from img2img_server.runtime.onnx.sessions import SessionOptions, open_session
from img2img_server.runtime.providers import cuda
from img2img_server.runtime.providers.device_runner import DeviceRunner

pytestmark = pytest.mark.usefixtures("gpu")
BUNDLES = ("sd1", "sd1:fp16", "sd1:bf16", "sdxl:fp16")


def load(bundle: Path, **settings: Any) -> Any:
    return load_pipeline(
        bundle, read_manifest(bundle), Execution(**{"provider": "cuda", "threads": 1, **settings}), Cache(1 << 24)
    )


@pytest.mark.parametrize("name", nightly_but(BUNDLES, "sd1", "sd1:fp16", "sd1:bf16"))
def test_every_graph_can_be_recorded(name: str, bundle: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    """Findings 2, 3 and 4 of the first look: no bf16 Conv in NHWC, shapes computed on the GPU, attention's scale on the CPU."""
    folder = bundle(name)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        load(folder)
    placed = [record.message for record in caplog.records if " runs " in record.message]
    assert len(placed) >= 4
    for line in placed:
        assert "recorded as CUDA graphs" in line, line
        assert "not recorded" not in line
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [message for message in warnings if "plain graph is used" not in message]


def test_unrecordable_graphs_are_reported_with_their_copies(
    bundle: Callable[[str], Path], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """With cuDNN's layout for all operators, which moves shape arithmetic to the GPU, as plain graphs were opened in earlier
    versions."""

    def open_badly(graph: Path, options: SessionOptions) -> Any:
        settings = (*options.provider_options, ("prefer_nhwc", "1"))
        return open_session(graph, SessionOptions("cuda", 1, provider_options=settings, recordable=options.recordable))

    folder = bundle("sd1")
    caplog.clear()
    placement = Placement(folder, read_manifest(folder), ProviderChoice("cuda"), open_badly)
    make = placement.logged(cuda.runners(Execution("cuda", 1), 1, placement.open))
    with caplog.at_level(logging.INFO):
        make("text_encoder", folder / "text_encoder" / "model.onnx")
    lines = [record.message for record in caplog.records if "not recorded" in record.message]
    assert lines
    assert all(int(line.partition("not recorded, ")[2].split()[0]) > 0 for line in lines)
    assert any("export the bundle again" in record.message for record in caplog.records)
    assert "Memcpy" not in capfd.readouterr().err, "ONNX Runtime's own words are not shown beside ours"


def test_fp32_is_computed_without_tf32(bundle: Callable[[str], Path]) -> None:
    asked: list[dict[str, str]] = []

    def note(graph: Path, options: SessionOptions) -> Any:
        asked.append(dict(options.provider_options))
        return open_session(graph, options)

    folder = bundle("sd1")
    for execution in (Execution("cuda", 1), Execution("cuda", 1, arithmetic="fp32")):
        load_pipeline(folder, read_manifest(folder), execution, Cache(0), open_graph=note)
    assert [given["use_tf32"] for given in asked] == ["1"] * 4 + ["0"] * 4
    assert not any("prefer_nhwc" in given for given in asked)


def test_first_outputs_of_a_shape_are_outside_the_arena(bundle: Callable[[str], Path], gpu: FakeGpu) -> None:
    """A later recording may use the same memory, so returned outputs would change."""
    folder = bundle("sd1")
    make = cuda.runners(Execution("cuda", 1), 1, open_session)
    runner = make("vae_encoder", folder / "vae_encoder" / "model.onnx")
    (given,) = runner.run({"sample": torch.zeros(1, 3, 64, 64, device="cuda")})
    owners = {segment["address"]: segment["total_size"] for segment in torch.cuda.memory_snapshot()}  # type: ignore[no-untyped-call]
    assert any(start <= given.data_ptr() < start + size for start, size in owners.items()), "it is torch's"


@pytest.mark.parametrize("provider", ["auto", "cuda"])
def test_gpu_that_cannot_run_a_bundle_is_reported_or_falls_back(
    provider: str, bundle: Callable[[str], Path], gpu: FakeGpu, caplog: pytest.LogCaptureFixture
) -> None:
    folder = bundle("sd1")
    with gpu.failing("cublasCreate_v2:-:3"):
        if provider == "cuda":
            with pytest.raises(BundleError, match=r"CUBLAS|cublas"):
                load(folder)
            return
        with caplog.at_level(logging.INFO):
            pipeline = load(folder, provider="auto")
    assert pipeline.engine == "onnx:cpu"
    assert "runs on the CPU, not on the GPU" in caplog.text
    assert "not on CUDA: " in caplog.text


def test_fused_graph_that_fails_to_run_falls_back_to_the_plain_one(
    bundle: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    """GroupNorm's kernel refuses some numbers of channels only when it is run: those of the tiny models are such."""
    folder = bundle("sd1:fp16")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        pipeline = load(folder)
    assert pipeline.engine == "onnx:cuda"
    placed = [record.message for record in caplog.records if " unet runs " in record.message]
    refused = [record.message for record in caplog.records if "the plain graph is used instead" in record.message]
    assert len(placed) == 1 + len(refused)


def test_arenas_make_few_allocations(bundle: Callable[[str], Path], gpu: FakeGpu) -> None:
    """For all sizes: kSameAsRequested made 51 while serving 44 shapes."""
    runner = cuda.runners(Execution("cuda", 1), 1, open_session)("unet", bundle("sd1") / "unet" / "model.onnx")
    shapes = [(rows, side) for side in range(8, 48, 8) for rows in (1, 2, 3, 4)]
    with gpu.counting() as counts:
        for rows, side in shapes:
            runner.run(
                {
                    "sample": torch.zeros(rows, 4, side, side, device="cuda"),
                    "timestep": torch.zeros(rows, device="cuda"),
                    "encoder_hidden_states": torch.zeros(rows, 77, 32, device="cuda"),
                }
            )
    assert counts["cudaMalloc"] <= 12, counts


def test_probe_checks_libraries_that_are_loaded_lazily(monkeypatch: pytest.MonkeyPatch) -> None:
    load_library = ctypes.CDLL

    def without_cudnn(name: str, *arguments: Any, **named: Any) -> Any:
        if "cudnn" in str(name):
            raise OSError("libcudnn.so.9: cannot open shared object file")
        return load_library(name, *arguments, **named)

    monkeypatch.setattr(ctypes, "CDLL", without_cudnn)
    providers.probe.cache_clear()
    try:
        assert "libcudnn.so.9" in providers.probe("cuda").problem
    finally:
        monkeypatch.undo()
        providers.probe.cache_clear()
    assert not providers.probe("cuda").problem


WHEELS = {
    "libcublasLt.so.13": "nvidia-cublas",
    "libcublas.so.13": "nvidia-cublas",
    "libcudart.so.13": "nvidia-cuda-runtime",
    "libcudnn.so.9": "nvidia-cudnn-cu13",
    "libcufft.so.12": "nvidia-cufft",
    "libcurand.so.10": "nvidia-curand",
}
"""The wheel that has each of CUDA's libraries; the driver has libcuda.so.1."""


def test_the_gpu_image_has_every_library_of_cuda_that_the_provider_loads() -> None:
    """Finding 1: PyTorch's wheels no longer brought libcurand."""
    binary = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    needed = [*needed_libraries(binary), "libcudnn.so.9"]
    libraries = [name for name in needed if name.startswith("libcu") and name != "libcuda.so.1"]
    assert len(libraries) >= 4
    lock = (Path(__file__).parents[2] / "deploy" / "requirements-cuda.lock").read_text()
    locked = {line.partition("==")[0] for line in lock.splitlines()}
    assert {WHEELS[name] for name in libraries} <= locked


@pytest.mark.parametrize("name", nightly_but(["sd1:fp16", "sdxl:fp16"], "sd1:fp16"))
def test_every_graph_has_a_trial_size(name: str, bundle: Callable[[str], Path]) -> None:
    """A graph without one would be served untested."""
    folder = bundle(name)
    sizes = Sizes(folder)
    make = cuda.runners(Execution("cuda", 1), 1, open_session)
    for component in read_manifest(folder).components:
        runner = make(component.name, folder / component.name / "model.onnx")
        assert isinstance(runner, DeviceRunner)
        assert sizes.axes(component.name, runner.inputs, sizes.trial()), component.name
