"""OpenVINO's plugin: which session runs which shapes, what it computes in, and what becomes of what it cannot take.

The real plugin runs here on any x86-64 CPU (openvino_device.py says how); only bfloat16 is played, for want of AMX.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import openvino_device
import pytest
import torch
from img2img_server.bundle.manifest import Component, Manifest, Verification, read_manifest
from img2img_server.bundle.manifest import Source as BundleSource
from img2img_server.engine.request import Pipeline, Request, run_alone
from img2img_server.errors import BundleError
from img2img_server.runtime.common import cpu
from img2img_server.runtime.execution import Bucket, Execution
from img2img_server.runtime.loader import load_pipeline
from img2img_server.runtime.onnx.runners import Runner
from img2img_server.runtime.onnx.sessions import SessionOptions, open_session
from img2img_server.runtime.providers import openvino
from img2img_server.runtime.providers.openvino import BucketRunner, has_amx, runners
from PIL import Image

pytestmark = pytest.mark.skipif(not openvino_device.is_installed(), reason="OpenVINO's plugin is not installed")

Axes = dict[str, list[str | int]]

UNET: Axes = {
    "sample": ["batch_size", 4, "sample_2", "sample_3"],
    "timestep": ["timestep_batch"],
    "encoder_hidden_states": ["batch_size", "sequence_length", 8],
}
DECODER: Axes = {"latent_sample": ["batch_size", 4, "latent_height", "latent_width"]}


class FakeSession:
    """A graph that counts its calls."""

    def __init__(self, name: str, inputs: Axes, fails: bool = False) -> None:
        self.name = name
        self.calls = 0
        self._fails = fails
        self._inputs = [SimpleNamespace(name=key, shape=shape, type="tensor(float)") for key, shape in inputs.items()]

    def get_inputs(self) -> list[Any]:
        return self._inputs

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name="out", shape=[], type="tensor(float)")]

    def run(self, names: list[str], feed: Mapping[str, Any]) -> list[Any]:
        if self._fails:
            raise onnxruntime.capi.onnxruntime_pybind11_state.Fail("no such kernel")
        self.calls += 1
        return [np.zeros(1, np.float32)]


class Opener:
    """Opens fakes, and keeps what it was asked for. `fails` are the providers whose sessions do not run."""

    def __init__(self, inputs: Axes, fails: tuple[str, ...] = (), refuses: tuple[str, ...] = ()) -> None:
        self.asked: list[SessionOptions] = []
        self.sessions: list[FakeSession] = []
        self._inputs, self._fails, self._refuses = inputs, fails, refuses

    def __call__(self, graph: Path, options: SessionOptions) -> Any:
        if options.provider in self._refuses:
            raise BundleError(f"{graph} does not open: no such operator")
        self.asked.append(options)
        self.sessions.append(FakeSession(options.provider, self._inputs, options.provider in self._fails))
        return self.sessions[-1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The settings of a Stable Diffusion of 64 x 64 pixels."""
    configs = {
        "unet": {"sample_size": 8},
        "vae_decoder": {"block_out_channels": [1, 2, 3, 4]},
        "text_encoder": {"max_position_embeddings": 77},
    }
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path


def _manifest(name: str = "unet", precision: str = "fp32", size: int = 0) -> Manifest:
    return Manifest(
        source=BundleSource(),
        pipeline_class="",
        family="",
        backend="onnx",
        components=(Component(name, precision, bytes=size),),
        files={},
        tools={},
        verification=Verification(True),
    )


def _make(folder: Path, opener: Opener, execution: Execution, manifest: Manifest | None = None, name: str = "unet") -> Runner:
    return runners(execution, 3, folder, manifest or _manifest(name), opener)(name, folder / name / "model.onnx")


def _feed(rows: int, height: int, width: int) -> dict[str, torch.Tensor]:
    return {
        "sample": torch.zeros(rows, 4, height, width),
        "timestep": torch.zeros(rows),
        "encoder_hidden_states": torch.zeros(rows, 77, 8),
    }


def test_common_shapes_have_sessions_of_their_own_and_all_others_share_one(folder: Path) -> None:
    opener = Opener(UNET)
    runner = _make(folder, opener, Execution(buckets=(Bucket(64, 64, 2), Bucket(128, 64, 4))))
    free, small, wide = opener.sessions
    assert [dict(options.dimensions) for options in opener.asked[1:]] == [
        {"batch_size": 2, "sample_2": 8, "sample_3": 8, "timestep_batch": 2, "sequence_length": 77},
        {"batch_size": 4, "sample_2": 8, "sample_3": 16, "timestep_batch": 4, "sequence_length": 77},
    ]
    for rows, height, width, session in ((2, 8, 8, small), (4, 8, 16, wide), (4, 16, 8, free), (1, 8, 8, free), (2, 9, 8, free)):
        before = [item.calls for item in opener.sessions]
        runner.run(_feed(rows, height, width))
        assert [item.calls - earlier for item, earlier in zip(opener.sessions, before, strict=True)] == [
            int(item is session) for item in opener.sessions
        ]


@pytest.mark.parametrize(
    ("name", "inputs", "buckets", "expected"),
    [
        ("unet", UNET, None, [2, 8, 8, 2, 77]),
        ("vae_decoder", DECODER, None, [1, 8, 8]),
        ("vae_decoder", DECODER, (Bucket(64, 128, 6),), [3, 16, 8]),
        ("vae_encoder", {"sample": ["batch_size", 3, "height", "width"]}, (Bucket(64, 128, 1),), [1, 128, 64]),
        ("unet", UNET | {"time_ids": ["batch_size", 6]}, None, [2, 8, 8, 2, 77]),
    ],
)
def test_by_default_the_native_size_is_prepared_with_two_rows(
    name: str, inputs: Axes, buckets: tuple[Bucket, ...] | None, expected: list[int], folder: Path
) -> None:
    opener = Opener(inputs)
    _make(folder, opener, Execution(buckets=buckets), name=name)
    assert [list(dict(options.dimensions).values()) for options in opener.asked] == [[], expected]


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("unet", UNET | {"unheard_of": ["batch_size", "some_axis"]}),
        ("transformer", {"hidden_states": ["batch_size", "sequence"]}),
        ("text_encoder", {"input_ids": ["batch_size", "sequence_length"]}),
    ],
)
def test_a_graph_whose_axes_are_not_known_has_one_session(name: str, inputs: Axes, folder: Path) -> None:
    opener = Opener(inputs)
    assert not isinstance(_make(folder, opener, Execution(), name=name), BucketRunner)
    assert [options.dimensions for options in opener.asked] == [()]
    none_wanted = Opener(UNET)
    _make(folder, none_wanted, Execution(buckets=()))
    assert len(none_wanted.asked) == 1


def test_a_session_that_would_fill_the_memory_is_left_out_unless_it_is_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "available_memory", lambda: 7 * 2**30)
    manifest = _manifest(precision="fp16", size=2**30)
    for execution, sessions in ((Execution(), 1), (Execution(buckets=(Bucket(64, 64, 2),)), 2)):
        opener = Opener(UNET)
        _make(folder, opener, execution, manifest)
        assert len(opener.asked) == sessions
    assert "4.0 of the available 7.0 GiB; --buckets 64x64:2 forces it" in caplog.text


def test_the_settings_are_one_stream_on_the_threads_that_were_asked_for(folder: Path) -> None:
    opener = Opener(UNET)
    runners(Execution(), 3, folder, _manifest(), opener, "bf16")("unet", folder)
    for options in opener.asked:
        settings = json.loads(dict(options.provider_options)["load_config"])["CPU"]
        assert settings["INFERENCE_PRECISION_HINT"] == options.arithmetic == "bf16"
        assert (settings["INFERENCE_NUM_THREADS"], settings["NUM_STREAMS"], options.threads) == ("3", "1", 3)


@pytest.mark.parametrize(
    ("opener", "precision", "reason"),
    [
        (Opener(UNET, refuses=("openvino",)), "fp32", "no such operator"),
        (Opener(UNET, fails=("openvino",)), "fp32", "no such kernel"),
        (Opener(UNET), "int8", "int8 graphs"),
    ],
    ids=["does not open", "does not run", "int8"],
)
def test_what_openvino_cannot_take_runs_on_the_cpu_provider_and_the_log_says_why(
    opener: Opener, precision: str, reason: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runner = _make(folder, opener, Execution(), _manifest(precision=precision))
    runner.run(_feed(2, 8, 8))
    assert (opener.sessions[-1].name, opener.sessions[-1].calls) == ("cpu", 1)
    assert "unet: runs on ONNX Runtime's CPU provider instead of OpenVINO: " in caplog.text
    assert reason in caplog.text


@pytest.mark.parametrize(
    ("capabilities", "flags", "arithmetic", "expected"),
    [
        ("FP32 BF16", "fpu amx_bf16 amx_tile", "auto", "bf16"),
        ("FP32 BF16", "fpu amx_bf16 amx_tile", "fp32", "f32"),
        ("FP32 BF16", "fpu avx512_bf16", "auto", "f32"),
        ("FP32 INT8", "fpu amx_bf16", "auto", "f32"),
    ],
)
def test_bfloat16_is_for_cpus_that_multiply_it(
    capabilities: str, flags: str, arithmetic: Any, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    information = tmp_path / "cpuinfo"
    information.write_text(f"vendor_id\t: GenuineIntel\nflags\t\t: {flags}\n", encoding="utf-8")
    device = SimpleNamespace(ep_metadata={"OPTIMIZATION_CAPABILITIES": capabilities})
    monkeypatch.setattr(openvino, "openvino_device", lambda: device)
    monkeypatch.setattr(openvino, "has_amx", lambda: has_amx(information))
    assert openvino.arithmetic(Execution(arithmetic=arithmetic)) == expected
    assert not has_amx(tmp_path / "nowhere")


@pytest.fixture
def plugin() -> Iterator[None]:
    """OpenVINO's device, for the time of a test."""
    with openvino_device.openvino_device():
        yield


@pytest.fixture(scope="module")
def exact(bundle: Callable[[str], Path]) -> Pipeline:
    """The demo's model on ONNX Runtime's CPU provider."""
    return load_pipeline(bundle("demo"), read_manifest(bundle("demo")), Execution("cpu"))


def _request(side: int, seeds: tuple[int, ...] = (3,)) -> Request:
    source = Image.linear_gradient("L").resize((side, side)).convert("RGB")
    return Request("", source, "a lake", None, 0.5, 4, 5.0, seeds)


def _difference(first: Pipeline, second: Pipeline, request: Request) -> int:
    drawn = [np.asarray(run_alone(pipeline, request)[0], np.int16) for pipeline in (first, second)]
    return int(np.abs(drawn[0] - drawn[1]).max())


@pytest.mark.usefixtures("plugin")
def test_in_float32_it_draws_what_the_cpu_provider_draws(
    bundle: Callable[[str], Path], exact: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    """At a size with a session of its own, and at one without."""
    execution = Execution("openvino", buckets=(Bucket(64, 64, 2),))
    with caplog.at_level(logging.INFO):
        pipeline = load_pipeline(bundle("demo"), read_manifest(bundle("demo")), execution)
    assert pipeline.engine == "onnx:openvino"
    assert "unet runs" in caplog.text
    assert "nodes on openvino (batch_size 2, height 8, width 8, timestep_batch 2, sequence_length" in caplog.text
    assert "in f32" in caplog.text
    for request in (_request(64), _request(72), _request(64, (1, 2))):
        assert _difference(pipeline, exact, request) <= 1


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("passes", [True, False])
def test_bfloat16_is_let_in_by_pictures_only(
    passes: bool, bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """bfloat16 is played: what is asked of the plugin is noted, and computed in float32. The waves of time are never in it."""
    folder = bundle("demo")  # Made before anything is played: others share it.
    monkeypatch.setattr(openvino, "arithmetic", lambda execution: "bf16" if execution.arithmetic == "auto" else "f32")
    asked: list[tuple[str, str]] = []

    def open_exactly(graph: Path, options: SessionOptions) -> onnxruntime.InferenceSession:
        asked.append((f"{graph.parent.name}/{graph.name}", options.arithmetic))
        if options.provider == "cpu":
            return open_session(graph, options)
        return open_session(graph, replace(options, provider_options=(("load_config", openvino.load_config("f32", 1)),)))

    manifest = read_manifest(folder)
    if not passes:
        manifest = replace(manifest, references=())
    execution = Execution("openvino", threads=1, buckets=())
    with caplog.at_level(logging.INFO):
        pipeline = load_pipeline(folder, manifest, execution, open_graph=open_exactly)
    assert pipeline.engine == "onnx:openvino"
    whole = {"text_encoder/model.onnx", "vae_encoder/model.onnx", "vae_decoder/model.onnx"}
    first, then = asked[:5], asked[5:]
    assert dict(first) == dict.fromkeys({*whole, "unet/body.onnx"}, "bf16") | {"unet/head.onnx": ""}, "no angle in bfloat16"
    assert dict(then) == ({} if passes else dict.fromkeys({*whole, "unet/model.onnx"}, "f32"))
    assert ("computes in bf16, PSNR of its reference images" in caplog.text) is passes
    assert ("computes in fp32 and not in bf16: the bundle has no reference images" in caplog.text) is not passes
    asked.clear()
    load_pipeline(folder, manifest, replace(execution, arithmetic="fp32"), open_graph=open_exactly)
    assert [arithmetic for _, arithmetic in asked] == ["f32"] * 4
