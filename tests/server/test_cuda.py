"""CUDA without a GPU: session options, opening of graphs, and that tensors stay on the device.

The device is torch's "meta": its tensors have no values, so any access from the host is an error.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes import make_request
from img2img_server.bundle.manifest import read_manifest
from img2img_server.engine.cache import Cache
from img2img_server.engine.request import Request
from img2img_server.errors import BundleError
from img2img_server.runtime.common.device_copy import device_stream, go_over, send
from img2img_server.runtime.diffusion.stepped import SteppedPipeline
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import FAMILIES
from img2img_server.runtime.onnx.components import Components
from img2img_server.runtime.onnx.runners import HostRunner, dtype_of
from img2img_server.runtime.onnx.sessions import SessionOptions, open_session, provider_list
from img2img_server.runtime.providers import cuda
from img2img_server.runtime.providers.device_runner import DeviceRunner
from img2img_server.runtime.schedulers import cache
from img2img_server.runtime.schedulers.registry import NAMES
from torch.utils._python_dispatch import TorchDispatchMode

ADDRESS = 94_000_000_000


def test_execution_settings_map_to_provider_options() -> None:
    plain = {"cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kNextPowerOfTwo", "use_tf32": "1"}
    assert dict(cuda.provider_options(Execution())) == plain
    recorded = dict(cuda.provider_options(Execution(gpu_memory=2**30, arithmetic="fp32"), stream=ADDRESS, graphs=True))
    assert recorded == plain | {
        "use_tf32": "0",
        "gpu_mem_limit": "1073741824",
        "user_compute_stream": "94000000000",
        "enable_cuda_graph": "1",
    }
    measured = dict(cuda.provider_options(Execution(), cudnn_attention=False, tf32=False))
    assert (measured["sdpa_kernel"], measured["use_tf32"]) == ("23", "0")
    assert dict(cuda.provider_options(Execution(), cudnn_attention=True))["sdpa_kernel"] == "31"


def test_graphs_cannot_be_recorded_on_the_default_stream() -> None:
    with pytest.raises(AssertionError, match="default stream"):
        cuda.provider_options(Execution(), graphs=True)


class Opener:
    """Opens no session, but records its options. Graphs in `uncapturable` cannot have CUDA graphs."""

    def __init__(self, *uncapturable: str) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        self._uncapturable = uncapturable

    def __call__(self, graph: Path, options: SessionOptions) -> Any:
        assert provider_list(options)[0][0] == "CUDAExecutionProvider"
        given = dict(options.provider_options)
        self.asked.append((graph.parent.name, given))
        if graph.parent.name in self._uncapturable and "enable_cuda_graph" in given:
            raise BundleError("This session cannot use the CUDA Graph feature as requested by the user")
        return SimpleNamespace(get_inputs=list, get_outputs=list, io_binding=object, run_with_iobinding=lambda *_: None)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A fake torch with CUDA, which returns a stream."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(cuda_stream=ADDRESS))
    device_stream.cache_clear()
    yield
    device_stream.cache_clear()


@pytest.mark.usefixtures("gpu")
def test_graphs_share_torchs_stream_and_are_recorded_if_possible() -> None:
    opener = Opener("vae_encoder")
    make = cuda.runners(Execution("cuda"), 4, opener)
    runners = [
        make(name, Path(folder) / "model.onnx")
        for name, folder in (("unet", "unet_fused"), ("vae_decoder", "vae_decoder"), ("vae_encoder", "vae_encoder"))
    ]
    assert all(isinstance(runner, DeviceRunner) for runner in runners)
    assert [(name, "enable_cuda_graph" in given) for name, given in opener.asked] == [
        ("unet_fused", True),
        ("vae_decoder", True),
        ("vae_encoder", True),
        ("vae_encoder", False),
    ]
    assert not any("prefer_nhwc" in given for _, given in opener.asked)
    assert {given["user_compute_stream"] for _, given in opener.asked} == {str(ADDRESS)}


@pytest.mark.usefixtures("gpu")
def test_cuda_graphs_can_be_switched_off() -> None:
    opener = Opener()
    cuda.runners(Execution("cuda", cuda_graphs=False), 4, opener)("unet", Path("unet/model.onnx"))
    assert ["enable_cuda_graph" in given for _, given in opener.asked] == [False]


@pytest.mark.usefixtures("gpu")
def test_graph_that_never_opens_is_an_error() -> None:
    def refuse(graph: Path, options: SessionOptions) -> Any:
        raise BundleError("no such file")

    with pytest.raises(BundleError, match="no such file"):
        cuda.runners(Execution("cuda"), 4, refuse)("unet", Path("unet/model.onnx"))


def test_without_cuda_in_torch_tensors_go_through_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    opener = Opener()
    assert cuda.tensor_device() == "cpu"
    assert isinstance(cuda.runners(Execution("cuda"), 4, opener)("unet", Path("unet/model.onnx")), HostRunner)
    assert not opener.asked[0][1].keys() & {"user_compute_stream", "enable_cuda_graph"}


def test_torch_switches_to_the_session_stream_after_its_pending_work(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def wait_stream(other: Any) -> None:
        done.append(f"wait for {other}")

    stream: Any = SimpleNamespace(wait_stream=wait_stream)
    current: list[Any] = ["default"]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])

    def set_stream(new: Any) -> None:
        current[0] = new
        done.append("go over")

    monkeypatch.setattr(torch.cuda, "set_stream", set_stream)
    go_over(stream)
    go_over(stream)
    assert done == ["wait for default", "go over"], "once"


class FarRunner:
    """A graph on the device: asserts the runner's guarantees, and returns outputs of the right shapes."""

    def __init__(self, path: Path) -> None:
        self._near = HostRunner(open_session(path, SessionOptions()))
        self.inputs, self.outputs = self._near.inputs, self._near.outputs

    def run(self, feed: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        for item in self.inputs:
            tensor = feed[item.name]
            assert (tensor.device.type, tensor.dtype) == ("meta", dtype_of(item)), item.name
            assert tensor.is_contiguous()
        near = self._near.run({name: torch.zeros_like(tensor, device="cpu") for name, tensor in feed.items()})
        return [torch.empty_like(output, device="meta") for output in near]


class Transfers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts copies from the host to the device, and records each copy that waits for all work of the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waiting: list[str] = []
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | (kwargs or {})
        source = given.get("src", given.get("self"))
        copies = func.overloadpacket in (torch.ops.aten.to, torch.ops.aten._to_copy, torch.ops.aten.copy_)
        if copies and isinstance(source, torch.Tensor) and (source.device.type, result.device.type) == ("cpu", "meta"):
            self.moved += 1
            if not given.get("non_blocking"):
                self.waiting.append(f"{func}: {tuple(source.shape)}")
        return result


@pytest.fixture(scope="module")
def far(bundle: Callable[[str], Path]) -> Callable[[str], SteppedPipeline]:
    """Gives a bundle's pipeline, all of whose tensors are on the device."""

    def load(name: str) -> SteppedPipeline:
        manifest = read_manifest(bundle(name))
        parts = Components(bundle(name), manifest, lambda _, path: FarRunner(path), "cuda", device="meta", tensors="meta")
        return FAMILIES[manifest.family](parts.pipeline(), "onnx:cuda", 1, Cache(2**20), manifest.latent_preview)

    return load


def requests_of(schedulers: Sequence[str | None]) -> list[Request]:
    """Requests with and without guidance, with one seed and with two."""
    return [
        make_request(
            scheduler=scheduler,
            num_inference_steps=5,
            strength=0.8,
            guidance_scale=(1.0, 7.5)[index % 2],
            seeds=(1, 2)[: 1 + index % 2],
            preview_interval=2,
            image=make_request().image.resize((64, 64)),
        )
        for index, scheduler in enumerate(schedulers)
    ]


SOME = (None, "DPM++ 2M Karras", "Euler a")


@pytest.mark.parametrize(
    ("name", "schedulers"),
    [
        ("sd1", (None, *NAMES)),
        pytest.param("sdxl", SOME, marks=pytest.mark.nightly),
        ("lcm", (None, None, None)),
        pytest.param("sd3-no-t5", (None, "Heun", "Euler"), marks=pytest.mark.nightly),
        ("flux-dev", (None, "Euler", None)),
    ],
)
def test_steps_stay_on_the_device_without_synchronizing(
    far: Callable[[str], SteppedPipeline], name: str, schedulers: Sequence[str | None]
) -> None:
    """Requests of all kinds together, their whole lives but the end."""
    pipeline = far(name)
    states = pipeline.prepare(requests_of(schedulers))
    assert {state.latents.device.type for state in states} == {"meta"}
    with Transfers() as transfers:
        while any(state.step < state.step_count for state in states):
            left = [state for state in states if state.step < state.step_count]
            pipeline.advance(left, pipeline.denoise(left))
    assert transfers.moved, "timesteps and coefficients"
    assert not transfers.waiting
    assert {state.latents.device.type for state in states} == {"meta"}
    with pytest.raises(RuntimeError, match="meta"):
        pipeline.finish(states[:1])  # the one place that must wait: is every value finite?


def test_uncompiled_schedulers_step_on_the_device(far: Callable[[str], SteppedPipeline], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "compile_schedule", lambda *_: None)
    pipeline = far("sd1")
    states = pipeline.prepare(requests_of([None, *NAMES]))
    while any(state.step < state.step_count for state in states):
        left = [state for state in states if state.step < state.step_count]
        pipeline.advance(left, pipeline.denoise(left))
    assert {state.latents.device.type for state in states} == {"meta"}


def test_send_casts_to_the_requested_dtype() -> None:
    sent = send(torch.arange(4), "meta", torch.float16)
    assert (sent.device.type, sent.dtype, sent.shape) == ("meta", torch.float16, (4,))
    here = torch.ones(2)
    assert send(here, "cpu") is here
    assert torch.equal(send(here, "cpu", torch.int64), torch.ones(2, dtype=torch.int64))
