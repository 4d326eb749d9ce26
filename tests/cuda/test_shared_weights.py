"""The graphs of a component share their weights on the GPU: one copy for plain, LoRA and control graphs."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from covering import nightly_but
from fake_gpu import FakeGpu
from img2img_server.bundle.adapter_files import LoraFiles
from img2img_server.bundle.manifest import read_manifest
from img2img_server.engine.cache import Cache
from img2img_server.errors import BundleError
from img2img_server.runtime.companions import Companions
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from img2img_server.runtime.lora.adapters import LoraSettings
from img2img_server.runtime.onnx import sessions
from img2img_server.runtime.onnx.graph_weights import Place, external_weights
from img2img_server.runtime.onnx.sessions import SessionOptions, open_session
from img2img_server.runtime.providers import cuda
from onnx import TensorProto, helper, numpy_helper

MB = 2**20
ROWS, COLUMNS = 4096, 4096
SIZE = 4 * ROWS * COLUMNS


def write(folder: Path, *names: str) -> None:
    """Graphs that multiply by the same matrix of 64 MB, in one weights file."""
    folder.mkdir()
    (folder / "weights").write_bytes(np.ones((ROWS, COLUMNS), np.float32).tobytes())
    for name in names:
        matrix = TensorProto(name="matrix", data_type=TensorProto.FLOAT, dims=[ROWS, COLUMNS])
        matrix.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "weights"), ("offset", "0"), ("length", str(SIZE))):
            matrix.external_data.add(key=key, value=value)
        ends = [
            helper.make_tensor_value_info(end, TensorProto.FLOAT, ["batch", width])
            for end, width in (("sample", ROWS), ("out", COLUMNS))
        ]
        graph = helper.make_graph([helper.make_node("MatMul", ["sample", "matrix"], ["out"])], name, ends[:1], ends[1:], [matrix])
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), folder / name)


def growth(gpu: FakeGpu, work: Callable[[], Any]) -> tuple[Any, int]:
    """The result of `work`, and the bytes of device memory that it takes."""
    before = gpu.used
    return work(), gpu.used - before


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "recorded"])
def test_second_graph_over_the_same_weights_takes_hardly_any_memory(gpu: FakeGpu, tmp_path: Path, graphs: bool) -> None:
    write(tmp_path / "unet", "model.onnx", "lora.onnx", "control.onnx")
    write(tmp_path / "alone", "model.onnx")
    gc.collect()
    torch.cuda.empty_cache()
    start = gpu.used
    make = cuda.runners(Execution("cuda", 1, cuda_graphs=graphs), 1, open_session)
    plain, first = growth(gpu, lambda: make("unet", tmp_path / "unet" / "model.onnx"))
    further, more = growth(
        gpu, lambda: [make(f"unet.{name}", tmp_path / "unet" / f"{name}.onnx") for name in ("lora", "control")]
    )
    alone, own = growth(gpu, lambda: make("alone", tmp_path / "alone" / "model.onnx"))
    print(f"first {first / MB:.1f} MiB, two further {more / MB:.1f} MiB, one without sharing {own / MB:.1f} MiB")
    assert SIZE <= first < 1.25 * SIZE
    assert more < 0.25 * SIZE
    assert own >= SIZE
    (out,) = further[0].run({"sample": torch.zeros(2, ROWS, device="cuda")})
    assert out.shape == (2, COLUMNS)
    del plain
    gc.collect()
    torch.cuda.empty_cache()
    assert gpu.used - start >= 2 * SIZE, "the weights stay for the other graphs"
    del further, alone, out
    gc.collect()
    torch.cuda.empty_cache()
    assert gpu.used - start < 0.25 * SIZE


def test_graph_that_does_not_open_over_shared_weights_has_its_own(
    gpu: FakeGpu, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "unet", "model.onnx", "lora.onnx")

    def open_graph(graph: Path, options: SessionOptions) -> Any:
        if options.weights:
            raise BundleError("these values are refused")
        return open_session(graph, options)

    make = cuda.runners(Execution("cuda", 1, cuda_graphs=False), 1, open_graph)
    (out,) = make("unet", tmp_path / "unet" / "model.onnx").run({"sample": torch.zeros(2, ROWS, device="cuda")})
    assert out.shape == (2, COLUMNS)
    assert "model.onnx is opened with weights of its own: these values are refused" in caplog.text


def is_unchanged(found: TensorProto, place: Place) -> bool:
    """Whether a weight of an optimized graph is that of the file: ONNX Runtime writes a reference to the file, or the values."""
    if tuple(found.dims) != place.shape:
        return False
    if found.data_location == TensorProto.EXTERNAL:
        entries = {entry.key: entry.value for entry in found.external_data}
        return (Path(entries["location"]).name, int(entries["offset"])) == (place.file.name, place.offset)
    values = place.read().contiguous().view(torch.uint8).numpy()
    return bool(numpy_helper.to_array(found).tobytes() == values.tobytes())


@pytest.mark.parametrize("name", nightly_but(("sd1", "sdxl:fp16", "klein"), "sd1"))
def test_optimizers_leave_shared_weights_as_they_are(
    name: str, bundle: Callable[[str], Path], gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a session would compute with a weight in another layout: optimizers read the file, the session the
    shared values."""
    opened: list[tuple[Path, SessionOptions, Path]] = []
    make_options = sessions._session_options

    def saving(options: SessionOptions) -> onnxruntime.SessionOptions:
        made = make_options(options)
        made.optimized_model_filepath = str(opened[-1][2])
        return made

    def open_graph(graph: Path, options: SessionOptions) -> Any:
        opened.append((graph, options, tmp_path / f"{len(opened)}.onnx"))
        return open_session(graph, options)

    monkeypatch.setattr(sessions, "_session_options", saving)
    (tmp_path / "loras").mkdir()
    folder, loras = bundle(name), LoraSettings(LoraFiles(tmp_path / "loras"), Cache(2**20), 2)
    pipeline: Any = load_pipeline(
        folder,
        read_manifest(folder),
        Execution("cuda", 1),
        Cache(2**24),
        open_graph=open_graph,
        loras=loras,
        companions=Companions(),
    )
    if getattr(pipeline._denoiser, "control", None) is not None:
        pipeline.open_control()
    shared = compared = 0
    places, tensors = set(), set()
    for graph, options, optimized in opened:
        known = external_weights(graph)
        kept = {item.name: item for item in onnx.load(optimized, load_external_data=False).graph.initializer}
        for weight, tensor in options.weights:
            places.add(known[weight])
            tensors.add(tensor.data_ptr())
            shared += 1
            if weight in kept:  # else no node reads it any more
                assert is_unchanged(kept[weight], known[weight]), weight
                compared += 1
    assert len(tensors) == len(places) < shared, "one copy of each"
    assert compared > 0.9 * shared
