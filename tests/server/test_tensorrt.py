"""TensorRT: what its engines are built for, keyed by and opened with. TensorRT itself is not yet run on a GPU."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from img2img_server.bundle.manifest import Component, Manifest, TensorSpec, read_manifest
from img2img_server.engine.cache import Cache
from img2img_server.errors import BundleError
from img2img_server.models.registry import Model, ModelRegistry
from img2img_server.runtime.execution import Bucket, Execution
from img2img_server.runtime.onnx.graph_sizes import Sizes
from img2img_server.runtime.onnx.runners import Runner
from img2img_server.runtime.onnx.sessions import SessionOptions, open_session
from img2img_server.runtime.tensorrt import options as tensorrt
from img2img_server.runtime.tensorrt.build import build, run_build
from img2img_server.runtime.tensorrt.cache import digest_of
from img2img_server.runtime.tensorrt.candidate import RunnerCache, candidates
from img2img_server.runtime.tensorrt.options import CONTEXT, Profile, Range, RangedRunner
from img2img_server.support.cancellation import Stop

Get = Callable[[str], Path]
NATIVE = Bucket(512, 512, 2)
MACHINE = {"gpu": "a GPU", "tensorrt": "101600"}
UNET = Component(
    "unet",
    "fp16",
    inputs=(
        TensorSpec("sample", "float16", ("batch_size", 4, "height", "width")),
        TensorSpec("timestep", "float", ("timestep_batch",)),
        TensorSpec("encoder_hidden_states", "float16", ("batch_size", "sequence_length", 768)),
        TensorSpec("fixed", "float", (1, 2)),
    ),
    bytes=10**9,
)


def axes(name: str, inputs: object, bucket: Bucket) -> dict[str, int]:
    rows = {"batch_size": bucket.rows, "timestep_batch": bucket.rows, "sequence_length": 77}
    return {**rows, "height": bucket.height // 8, "width": bucket.width // 8}


def options(component: Component = UNET, buckets: tuple[Bucket, ...] | None = None, **settings: Any) -> dict[str, str]:
    profile = Profile.of(buckets, NATIVE)
    assert profile is not None
    return tensorrt.build_options(component, tensorrt.ranges(component, profile, axes), **settings)


def test_profile_covers_every_bucket_and_is_optimal_for_the_first() -> None:
    buckets = (Bucket(768, 512, 4), Bucket(512, 768, 2), Bucket(640, 640, 6))
    assert Profile.of(buckets, NATIVE) == Profile(Bucket(512, 512, 1), Bucket(768, 512, 4), Bucket(768, 768, 6))
    assert Profile.of(None, NATIVE) == Profile(Bucket(512, 512, 1), NATIVE, Bucket(512, 512, 8))
    assert Profile.of((), NATIVE) is None


def test_profile_shapes_are_in_the_providers_format() -> None:
    """input:dims, joined by commas, the same inputs in all three; an input that does not vary has none."""
    made = options()
    assert made["trt_profile_min_shapes"] == "sample:1x4x64x64,timestep:1,encoder_hidden_states:1x77x768"
    assert made["trt_profile_opt_shapes"] == "sample:2x4x64x64,timestep:2,encoder_hidden_states:2x77x768"
    assert made["trt_profile_max_shapes"] == "sample:8x4x64x64,timestep:8,encoder_hidden_states:8x77x768"
    wide = options(buckets=(Bucket(768, 512, 2),))
    assert wide["trt_profile_opt_shapes"].startswith("sample:2x4x64x96,")


def test_engine_uses_the_bundles_precision() -> None:
    named = {precision: options(replace(UNET, precision=precision)) for precision in ("fp32", "fp16", "bf16")}
    for precision, made in named.items():
        enabled = {name for name in made if name in ("trt_fp16_enable", "trt_bf16_enable", "trt_int8_enable")}
        assert enabled == ({f"trt_{precision}_enable"} if precision != "fp32" else set())


def test_engine_context_is_written_with_relative_paths_only() -> None:
    made = options()
    assert (made["trt_dump_ep_context_model"], made["trt_ep_context_embed_mode"], made["trt_engine_cache_enable"]) == (
        "1",
        "0",
        "1",
    )
    assert made["trt_ep_context_file_path"] == CONTEXT
    assert not any("/" in value for value in made.values()), "the provider takes relative paths only"
    assert "trt_engine_cache_path" not in made


def test_workspace_is_limited_and_large_weights_are_external() -> None:
    assert int(options()["trt_max_workspace_size"]) == 4 * 2**30
    assert int(options(gpu_memory=2**30)["trt_max_workspace_size"]) == 2**30
    assert "trt_load_user_initializer" not in options()
    assert options(replace(UNET, bytes=5 * 10**9))["trt_load_user_initializer"] == "1"


def test_an_engine_shares_torchs_stream() -> None:
    assert dict(tensorrt.serving_options(4096))["user_compute_stream"] == "4096"
    assert "user_compute_stream" not in dict(tensorrt.serving_options(None))
    assert "trt_dump_ep_context_model" not in dict(tensorrt.serving_options(4096))


def test_unknown_input_sizes_are_an_error() -> None:
    profile = Profile.of(None, NATIVE)
    assert profile is not None
    with pytest.raises(BundleError, match="unet has inputs"):
        tensorrt.ranges(UNET, profile, lambda name, inputs, bucket: None)


def test_engine_key_covers_everything_the_engine_depends_on(bundle: Get) -> None:
    manifest = read_manifest(bundle("sd1"))
    (unet,) = (part for part in manifest.components if part.name == "unet")
    other_weights = replace(manifest, files={**manifest.files, "unet/model.onnx": "0" * 64})
    other_text = replace(manifest, files={**manifest.files, "text_encoder/model.onnx": "0" * 64})
    base = options()

    def digest(manifest: Manifest = manifest, made: Mapping[str, str] = base, machine: Mapping[str, str] = MACHINE) -> str:
        return digest_of(tensorrt.key(unet, manifest, made, machine))

    assert digest() == digest(other_text), "another part's files do not matter"
    changed = [
        digest(other_weights),
        digest(made=options(buckets=(Bucket(768, 768, 2),))),
        digest(made=options(replace(UNET, precision="bf16"))),
        *(digest(machine={**MACHINE, name: "other"}) for name in MACHINE),
    ]
    assert len({digest(), *changed}) == 1 + len(changed)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "lcm"])
def test_computed_input_sizes_match_the_pipelines_inputs(bundle: Get, name: str) -> None:
    """The engine is optimal for the inputs that the pipeline really passes at the optimal size."""
    path, manifest = bundle(name), read_manifest(bundle(name))
    profile = Profile.of((Bucket(64, 48, 2),), NATIVE)
    assert profile is not None
    for part in manifest.components:
        if part.name in tensorrt.COMPONENTS:
            allowed = tensorrt.ranges(part, profile, Sizes(path).axes)
            session = open_session(path / part.name / "model.onnx", SessionOptions())
            feed = {
                item.name: torch.zeros(allowed[item.name].best if item.name in allowed else item.shape).numpy()
                for item in session.get_inputs()
            }
            assert session.run(None, feed)[0].shape[-2:] == ((6, 8) if part.name == "unet" else (48, 64))


class Remembering:
    """A runner that records its inputs."""

    inputs = outputs = ()

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def run(self, feed: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        self.shapes.append(tuple(feed["x"].shape))
        return []


def test_shapes_outside_the_profile_fall_back_to_the_other_runner() -> None:
    engine, other = Remembering(), Remembering()
    runner: Runner = RangedRunner(engine, other, {"x": Range((1, 4), (2, 4), (4, 8))})
    for shape in ((1, 4), (4, 8), (5, 8), (2, 3)):
        runner.run({"x": torch.zeros(shape), "free": torch.zeros(9)})
    assert engine.shapes == [(1, 4), (4, 8)]
    assert other.shapes == [(5, 8), (2, 3)]


def test_build_without_an_output_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    opened = []

    def open_graph(graph: Path, options: SessionOptions) -> Any:
        opened.append((graph, options))
        if len(opened) == 2:
            Path(dict(options.provider_options)["trt_ep_context_file_path"]).touch()

    with pytest.raises(BundleError, match="does not support the whole graph"):
        build(Path("model.onnx"), Path("out"), options(), open_graph)
    monkeypatch.chdir(tmp_path)
    build(Path("model.onnx"), Path("out"), options(), open_graph)
    assert (tmp_path / "out" / CONTEXT).exists()
    assert [(graph, settings.provider) for graph, settings in opened] == [(tmp_path / "model.onnx", "tensorrt")] * 2


def test_build_process_reports_a_missing_provider(bundle: Get, tmp_path: Path) -> None:
    """The real program. If ONNX Runtime is built without TensorRT, it does not fall back to another provider."""
    assert "TensorrtExecutionProvider" not in onnxruntime.get_available_providers()
    job = {"graph": str(bundle("sd1") / "vae_decoder" / "model.onnx"), "folder": str(tmp_path), "options": options()}
    command = [sys.executable, "-m", "img2img_server.runtime.tensorrt.build"]
    with pytest.raises(BundleError, match="was to run on TensorrtExecutionProvider"):
        run_build(command, job, lambda step, done: None, Stop())
    assert not list(tmp_path.iterdir())


def test_without_tensorrt_there_are_no_candidates(bundle: Get) -> None:
    store = ModelRegistry([Model("m")])
    for provider in ("auto", "tensorrt", "cuda", "cpu"):
        assert candidates(store, Execution(provider), Cache(0), RunnerCache()) == []


def test_serving_engines_are_not_loaded_twice(tmp_path: Path) -> None:
    """Of the same bundle only; the serving graph may be the fused variant of the requested one."""
    runner_cache, made = RunnerCache(), list[Path]()

    def make(name: str, graph: Path) -> Runner:
        made.append(graph)
        return Remembering()

    runner = runner_cache.keep(make)("unet", tmp_path / "a" / "unet" / "fused" / "model.onnx")
    assert runner_cache.make("unet", tmp_path / "a" / "unet" / "model.onnx") is runner
    assert len(made) == 1
    for bundle, name in (("b", "unet"), ("a", "vae_decoder")):
        with pytest.raises(BundleError, match="was not opened before"):
            runner_cache.make(name, tmp_path / bundle / name / "model.onnx")
