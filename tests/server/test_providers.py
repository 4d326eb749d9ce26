"""Available providers, and the reasons why others are unavailable. GPUs are simulated by fake libraries."""

import ctypes
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest
from img2img_server.errors import BundleError
from img2img_server.runtime.execution import PROVIDERS
from img2img_server.runtime.onnx import providers
from img2img_server.runtime.onnx.providers import FULL_NAMES, Probe, choose, missing_library, needed_libraries, probe
from soak_parts.stand_in import plant


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What is found under other circumstances must not be remembered."""
    probe.cache_clear()
    yield
    probe.cache_clear()


@pytest.fixture
def every_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ONNX Runtime that lists all providers, as its GPU builds do on every machine."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(FULL_NAMES.values()))


def _play(monkeypatch: pytest.MonkeyPatch, **problems: str) -> None:
    """Has the providers that are named be found with these problems; "" is none."""
    monkeypatch.setattr(providers, "probe", lambda name: Probe(name, problem=problems.get(name, "")))


@pytest.mark.parametrize("place", range(len(PROVIDERS)))
def test_auto_chooses_the_first_usable_provider_and_keeps_the_reasons(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _play(monkeypatch, **{name: f"no {name} here" for name in PROVIDERS[:place]})
    choice = choose("auto")
    assert choice.provider == PROVIDERS[place]
    assert [item.problem for item in choice.declined] == [f"no {name} here" for name in PROVIDERS[:place]]
    for name in PROVIDERS[:place]:
        assert f"no {name} here" in str(choice)


def test_a_provider_by_name_is_used_or_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    _play(monkeypatch, cuda="the driver is on holiday")
    assert (choose("cpu").provider, choose("cpu").declined) == ("cpu", ())
    with pytest.raises(BundleError, match="provider 'cuda' cannot be used: the driver is on holiday"):
        choose("cuda")


@pytest.mark.parametrize("name", PROVIDERS)
def test_every_probe_works_on_this_machine_and_is_cached(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = probe(name)
    assert found.name == name
    assert not (name == "cpu" and found.problem)
    monkeypatch.setattr(onnxruntime, "get_available_providers", None)
    monkeypatch.setattr(onnxruntime, "get_ep_devices", None)
    assert probe(name) is found


@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_missing_provider_in_the_wheel_is_reported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "built without it" in probe(name).problem


@pytest.mark.usefixtures("every_wheel")
@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_missing_driver_is_reported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(library: str) -> object:
        raise OSError(f"{library}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert "no NVIDIA driver (libcuda.so.1)" in probe(name).problem


class Driver:
    """A fake of NVIDIA's driver with this number of devices."""

    def __init__(self, devices: int, fails: int = 0) -> None:
        self._devices, self._fails = devices, fails

    def cuInit(self, flags: int) -> int:
        return self._fails

    def cuDeviceGetCount(self, count: object) -> int:
        count._obj.value = self._devices  # type: ignore[attr-defined]
        return 0

    def cuDeviceGetName(self, name: object, length: int, device: int) -> int:
        name.value = b"Fake GPU"  # type: ignore[attr-defined]
        return 0


@pytest.mark.usefixtures("every_wheel")
@pytest.mark.parametrize(
    ("driver", "provider", "lacking", "problem"),
    [
        (Driver(0), "cuda", "", "has no device"),
        (Driver(1, fails=803), "cuda", "", "CUDA error 803"),
        (Driver(1), "cuda", "libcudnn.so.9", "libcudnn.so.9: cannot open"),
        (Driver(1), "tensorrt", "libcudnn.so.9", "libcudnn.so.9: cannot open"),
        (Driver(1), "tensorrt", "libnvinfer.so.10", "libnvinfer.so.10: cannot open"),
        (Driver(1), "cuda", "libnvinfer.so.10", ""),
        (Driver(1), "tensorrt", "", ""),
    ],
)
def test_missing_gpu_requirement_is_reported(
    driver: Driver, provider: str, lacking: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(library: str) -> object:
        if library == lacking:
            raise OSError(f"{library}: cannot open shared object file")
        return driver

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(providers, "needed_libraries", lambda path: ["libonnxruntime_providers_shared.so", "libcudnn.so.9"])
    found = probe(provider)
    assert problem in found.problem
    assert bool(problem) == bool(found.problem)
    assert found.detail == ("" if problem else "Fake GPU")


def test_missing_library_dependencies_are_reported_without_loading(tmp_path: Path) -> None:
    """ONNX Runtime's own library, in a copy whose list of needed libraries names one that is nowhere."""
    real = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_shared.so"
    assert missing_library([real]) == ""
    broken = tmp_path / real.name
    broken.write_bytes(real.read_bytes().replace(b"libstdc++.so.6\0", b"libstdc++.so.x\0"))
    assert "libstdc++.so.x" in needed_libraries(broken)
    assert "libstdc++.so.x: cannot open" in missing_library([broken])


HEAD = b"\x7fELF\x02\x01"


@pytest.mark.parametrize("content", [b"", b"text", HEAD, HEAD + b"\xff" * 58, HEAD + bytes(90)], ids=range(5))
def test_invalid_library_file_is_reported(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "lib.so").write_bytes(content)
    with pytest.raises(ValueError, match=r"lib\.so is not a complete shared library"):
        needed_libraries(tmp_path / "lib.so")
    assert "cannot be read" in missing_library([tmp_path / "lib.so"])
    assert "cannot be read" in missing_library([tmp_path / "nowhere.so"])


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_truncated_library_file_is_reported(part: float, tmp_path: Path) -> None:
    """A download that was cut off: a missing table of names must not become a list without names."""
    whole = (Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_shared.so").read_bytes()
    (tmp_path / "lib.so").write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match=r"lib\.so is not a complete shared library"):
        needed_libraries(tmp_path / "lib.so")


def test_missing_openvino_is_reported_with_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'img2img-server[openvino]'" in probe("openvino").problem


def test_openvino_load_failure_is_reported() -> None:
    assert probe("openvino").problem == "it does not load: hidden by tests/conftest.py"
    assert "openvino_telemetry" not in sys.modules


@pytest.mark.parametrize(
    ("devices", "problem"),
    [(["CPU"], ""), (["CPU", "GPU"], ""), (["GPU"], "it does not support this CPU"), ([], "it does not support this CPU")],
)
def test_openvino_requires_a_supported_cpu(devices: list[str], problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "openvino_core", lambda: SimpleNamespace(available_devices=devices))
    assert probe("openvino").problem == problem


def test_unavailable_provider_ends_the_server_with_one_line(tmp_path: Path) -> None:
    if not probe("tensorrt").problem:
        pytest.skip("this machine has TensorRT")
    plant(tmp_path, "m")
    command = [sys.executable, "-m", "img2img_server", "--models", str(tmp_path), "--port", "0"]
    command += ["--provider", "tensorrt", "--log-level", "error"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.splitlines() == [f"img2img serve: provider 'tensorrt' cannot be used: {probe('tensorrt').problem}"]


def test_tensorrt_libraries_are_loaded_from_its_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt_libs").mkdir()
    (tmp_path / "tensorrt_libs" / "__init__.py").touch()
    library = tmp_path / "tensorrt_libs" / "libnvinfer.so.10"
    library.touch()
    loaded: list[str] = []
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(ctypes, "CDLL", lambda name, mode=0: loaded.append(name))
    providers.preload_tensorrt()
    library.unlink()
    providers.preload_tensorrt()
    assert loaded == [str(library)]
