"""TensorRT as a candidate: engines for the heavy components of a model that CUDA serves meanwhile. Not yet run on a GPU."""

import ctypes
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from weakref import WeakValueDictionary

import onnxruntime
import torch
from PIL import Image

from img2img_server.bundle.manifest import Component, Manifest, Precision
from img2img_server.engine.cache import Cache
from img2img_server.engine.request import Pipeline, Request
from img2img_server.errors import BundleError
from img2img_server.runtime import accuracy_check
from img2img_server.runtime.common.device_copy import device_stream, enter_stream
from img2img_server.runtime.companions import Companions
from img2img_server.runtime.execution import Bucket, Execution
from img2img_server.runtime.image_prompts.prompts import ImageAdapterSettings
from img2img_server.runtime.loader import FAMILIES, Loading, assemble
from img2img_server.runtime.lora.adapters import LoraSettings
from img2img_server.runtime.onnx.graph_sizes import Sizes
from img2img_server.runtime.onnx.providers import choose
from img2img_server.runtime.onnx.runners import CONTROL_RUNNER, HostRunner, Make, Runner, bundle_of
from img2img_server.runtime.onnx.sessions import Open, SessionOptions, open_session
from img2img_server.runtime.providers import cuda
from img2img_server.runtime.providers.device_runner import DeviceRunner
from img2img_server.runtime.tensorrt import options as tensorrt
from img2img_server.runtime.tensorrt.build import run_build
from img2img_server.runtime.tensorrt.cache import EngineCache, default_root
from img2img_server.support.cancellation import Stop
from img2img_server.support.device_lock import DEVICE_IN_USE

_MAJOR, _MINOR = 75, 76
"""The driver's attribute numbers of a GPU's compute capability."""
_BUILDER = (sys.executable, "-m", "img2img_server.runtime.tensorrt.build")


@dataclass(frozen=True, slots=True)
class Workshop:
    """The dependencies of building and opening engines. `machine` names the GPU, the driver and the libraries.

    `other` makes runners of the serving provider, for components and sizes without an engine. `tensors` is where runners expect
    tensors: "cuda", or "cpu" if PyTorch has no CUDA. `loras`, `companions` and `image_adapters` are those of requests.
    """

    execution: Execution
    machine: Mapping[str, str]
    engines: EngineCache
    cache: Cache
    other: Make
    tensors: str
    open_graph: Open = open_session
    builder: Sequence[str] = _BUILDER
    loras: LoraSettings | None = None
    companions: Companions | None = None
    image_adapters: ImageAdapterSettings | None = None


class TensorRTCandidate:
    """Builds, loads and checks TensorRT's engines of one model. Implements promotion.Candidate."""

    def __init__(self, model: str, bundle: Path, manifest: Manifest, native: tuple[int, int], workshop: Workshop) -> None:
        self.model = model
        self.engine = f"{manifest.backend}:tensorrt"
        self._bundle, self._manifest, self._workshop = bundle, manifest, workshop
        self._profile = tensorrt.Profile.of(workshop.execution.buckets, Bucket(*native, 2))
        self._built: dict[str, tuple[Path, tensorrt.Ranges]] = {}
        self._cases: tuple[accuracy_check.ReferenceCase, ...] = ()

    def build(self, tell: Callable[[str, float], None], stop: Stop) -> None:
        """Builds each component, or finds it in the cache. Progress is counted in components, by the bytes of their weights."""
        parts = [
            item
            for item in self._manifest.components
            if item.name in tensorrt.COMPONENTS and item.precision != "int8" and not item.weight_format
        ]
        if not parts or self._profile is None:
            raise BundleError("the bundle has no component for which TensorRT can build an engine")
        sizes, total, done = Sizes(self._bundle), sum(part.bytes for part in parts) or 1, 0
        for part in parts:
            tell(f"building {part.name}", done / total)
            allowed = tensorrt.ranges(part, self._profile, sizes.axes)
            self._built[part.name] = self._obtain(part, allowed, stop), allowed
            done += part.bytes

    def load(self) -> Pipeline:
        """Loads a second pipeline of the bundle, with the engines."""
        shop = self._workshop
        shared = shop.loras, shop.companions, shop.image_adapters
        loading = Loading(self._bundle, self._manifest, shop.execution, shop.cache, *shared)
        make = self._maker(loading.threads)
        with DEVICE_IN_USE:
            return assemble(loading, make, "tensorrt", shop.tensors)

    def trials(self) -> Sequence[Request]:
        """The requests of the bundle's reference images."""
        self._cases = accuracy_check.cases(self._manifest, self._bundle)
        return [case.request for case in self._cases]

    def judge(self, images: Sequence[Image.Image]) -> str:
        """Compares `images` with the reference images, by the limits of the precision: TensorRT may compute fp32 in TF32.

        Returns the problem, or "".
        """
        precision: Precision = self._manifest.precision  # type: ignore[assignment]
        if precision == "fp32" and self._workshop.execution.arithmetic == "auto":
            precision = "fp16"
        return accuracy_check.compare(
            self._cases, images, accuracy_check.least_psnr_db(precision, self._manifest.weight_format)
        ).problem

    def settle(self) -> None:
        """Waits for the GPU."""
        if self._workshop.tensors == "cuda":
            torch.cuda.synchronize()

    def _obtain(self, part: Component, allowed: tensorrt.Ranges, stop: Stop) -> Path:
        shop = self._workshop
        options = tensorrt.build_options(part, allowed, shop.execution.gpu_memory)
        graph = self._bundle / part.name / "model.onnx"

        def build(folder: Path) -> None:
            with tempfile.TemporaryDirectory(prefix="img2img-timing-") as timing:
                self._fetch_timing(Path(timing), stop)
                job = {"graph": str(graph.resolve()), "folder": str(folder.resolve())}
                run_build(
                    shop.builder, {**job, "options": options | tensorrt.timing_options(timing)}, lambda step, done: None, stop
                )
                self._keep_timing(Path(timing), stop)

        return shop.engines.obtain(tensorrt.key(part, self._manifest, options, shop.machine), build, stop)

    def _fetch_timing(self, folder: Path, stop: Stop) -> None:
        """Copies this machine's kernel timings to the folder in which the provider looks for them."""
        found = self._workshop.engines.find(tensorrt.timing_key(self._workshop.machine), stop)
        for path in found.glob("*.timing") if found is not None else ():
            shutil.copyfile(path, folder / path.name)

    def _keep_timing(self, folder: Path, stop: Stop) -> None:
        files = {path.name: path for path in folder.glob("*.timing")}
        if files:
            self._workshop.engines.replace(tensorrt.timing_key(self._workshop.machine), files, stop)

    def _maker(self, threads: int) -> Make:
        shop = self._workshop
        stream = device_stream().cuda_stream if shop.tensors == "cuda" else None

        def opened(folder: Path) -> Runner:
            options = tensorrt.serving_options(stream)
            context = folder / tensorrt.CONTEXT
            session = shop.open_graph(context, SessionOptions("tensorrt", threads, provider_options=options))
            if stream is None:
                return HostRunner(session)
            return DeviceRunner(session, shop.tensors, enter_stream, owner=self._bundle)

        def make(name: str, graph: Path) -> Runner:
            other = shop.other(name, graph)
            if name not in self._built:
                return other
            folder, allowed = self._built[name]
            return tensorrt.RangedRunner(opened(folder), other, allowed)

        return make


class LoadedModel(Protocol):
    """A model of the server's registry: its folder, manifest and pipeline, if it is in memory."""

    @property
    def id(self) -> str:
        """The id in requests."""
        ...

    @property
    def manifest(self) -> Manifest | None:
        """Its bundle's manifest, None if it was not read."""
        ...

    @property
    def pipeline(self) -> Pipeline | None:
        """Its pipeline, None if it is not in memory."""
        ...

    @property
    def bundle(self) -> Path | None:
        """Its bundle's folder."""
        ...


class RunnerCache:
    """The runners that serve, so that a second pipeline of the same bundle can share them and their weights.

    Has weak references: the runners are freed with the pipeline of their model.
    """

    def __init__(self) -> None:
        self._runners: WeakValueDictionary[tuple[Path, str], Runner] = WeakValueDictionary()
        self._makes: dict[Path, Make] = {}

    def keep(self, make: Make) -> Make:
        """Wraps `make` to remember its runners."""

        def kept(name: str, graph: Path) -> Runner:
            runner = make(name, graph)
            self._runners[bundle_of(name, graph), name] = runner
            self._makes[bundle_of(name, graph)] = make
            return runner

        return kept

    def make(self, name: str, graph: Path) -> Runner:
        """The remembered runner of the component `name` of the same bundle, made from `graph` or its fused variant. A control
        graph is opened when it is first needed, which may be now."""
        bundle = bundle_of(name, graph)
        runner = self._runners.get((bundle, name))
        if runner is None and name.endswith(CONTROL_RUNNER) and bundle in self._makes:
            return self.keep(self._makes[bundle])(name, graph)
        if runner is None:
            raise BundleError(f"{graph} was not opened before")
        return runner


def candidates(
    models: Iterable[LoadedModel],
    execution: Execution,
    cache: Cache,
    runner_cache: RunnerCache,
    loras: LoraSettings | None = None,
    companions: Companions | None = None,
    image_adapters: ImageAdapterSettings | None = None,
) -> list[TensorRTCandidate]:
    """TensorRT candidates of the models that it could run faster; empty if TensorRT or `execution` rules them out."""
    if execution.provider not in ("auto", "tensorrt") or execution.buckets == ():
        return []
    try:
        if choose(execution.provider).provider != "tensorrt":
            return []
    except BundleError:
        return []
    engines = EngineCache(execution.cache or default_root())
    workshop = Workshop(
        execution, machine(), engines, cache, runner_cache.make, cuda.tensor_device(), loras=loras, companions=companions,
        image_adapters=image_adapters,
    )  # fmt: skip
    found = []
    for model in filter(_could_be_faster, models):
        assert model.bundle is not None, "a loaded model has a folder"
        assert model.manifest is not None, "a loaded model has a manifest"
        assert model.pipeline is not None, "a loaded model has a pipeline"
        found.append(TensorRTCandidate(model.id, model.bundle, model.manifest, model.pipeline.native_size, workshop))
    return found


def machine() -> dict[str, str]:
    """The GPU and the libraries that engines depend on, by name; "" for unknown values. Not yet run on a GPU."""
    found = {"onnxruntime": onnxruntime.__version__, "gpu": "", "compute_capability": "", "driver": "", "tensorrt": ""}
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        name, number = ctypes.create_string_buffer(256), ctypes.c_int()
        if not driver.cuInit(0) and not driver.cuDeviceGetName(name, len(name), 0):
            found["gpu"] = name.value.decode(errors="replace")
        capability = []
        for attribute in (_MAJOR, _MINOR):
            driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, 0)
            capability.append(str(number.value))
        driver.cuDriverGetVersion(ctypes.byref(number))
        found |= {"compute_capability": ".".join(capability), "driver": str(number.value)}
        found["tensorrt"] = str(ctypes.CDLL("libnvinfer.so.10").getInferLibVersion())
    except (OSError, AttributeError):
        return found
    return found


def _could_be_faster(model: LoadedModel) -> bool:
    """Whether CUDA runs the model's graphs step by step, with a UNet: TensorRT engines of transformers were not tried."""
    manifest, pipeline = model.manifest, model.pipeline
    if manifest is None or pipeline is None or model.bundle is None:
        return False
    has_unet = any(part.name == "unet" for part in manifest.components)
    return has_unet and manifest.family in FAMILIES and pipeline.engine == "onnx:cuda"
