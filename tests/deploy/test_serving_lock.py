"""The container installs a subset of the tested packages, and the SBOM lists exactly those."""

import json
from importlib import metadata
from typing import Any

import pytest
import sbom
import serving_lock

_EXPORTING = {"optimum", "optimum-onnx", "onnx", "scikit-image", "scipy", "pytest", "mypy"}


def test_serving_locks_match_requirements_lock() -> None:
    assert list(serving_lock.faults()) == []


def test_serving_lock_does_not_depend_on_the_torch_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """requirements.lock is for both builds of torch; PyPI's names CUDA's libraries as its needs."""
    requires, resolve = metadata.requires, serving_lock.closure.__wrapped__
    found = resolve(serving_lock.EXTRAS["cpu"])
    cuda = ["triton==3.7.1; platform_system == 'Linux'", "nvidia-cudnn-cu13==9.20.0.48", "cuda-toolkit[cublas]==13.0.3"]
    monkeypatch.setattr(metadata, "requires", lambda name: (requires(name) or []) + (cuda if name == "torch" else []))
    assert resolve(serving_lock.EXTRAS["cpu"]) == found


@pytest.mark.parametrize("name", serving_lock.EXTRAS)
def test_serving_locks_exclude_the_export_stack(name: str) -> None:
    assert not _EXPORTING & serving_lock.pins(serving_lock.read(name)).keys()


@pytest.mark.parametrize(
    ("lock", "before", "after", "fault"),
    [
        ("cpu", "pillow==", "pillow==0.", "cpu: pillow is 0."),
        ("cpu", "torch==2", "onnx==1.0 \\\ntorch==2", "cpu: onnx is 1.0, should be absent"),
        ("cpu", "+cpu", "", "cpu: torch is"),
        ("cuda", "diffusers==", "elsewhere==", "cuda: diffusers is absent"),
        ("cuda", "onnxruntime-gpu==", "onnxruntime-gpu==0.", "cuda: onnxruntime-gpu is 0."),
        ("cuda", "nvidia-", "triton-", "cuda: torch came without CUDA's libraries"),
        ("ray", "ray==", "ray==0.", "ray: ray is 0."),
        ("", "pillow==", "pillow==0.", "cpu: pillow is"),
        ("build", " \\\n", "\n", "has no hash"),
    ],
)
def test_outdated_lock_is_detected(lock: str, before: str, after: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = serving_lock.read
    assert before in real(lock)
    monkeypatch.setattr(serving_lock, "read", lambda name: real(name).replace(before, after) if name == lock else real(name))
    assert any(fault in found for found in serving_lock.faults())


@pytest.mark.parametrize(("image", "ray"), [("cpu", False), ("cuda", True)])
def test_sbom_lists_exactly_the_locked_packages(image: str, ray: bool) -> None:
    locked = serving_lock.pins(serving_lock.read(image) + (serving_lock.read("ray") if ray else ""))
    components = {str(component.name): component for component in sbom.bill(image, ray).components}
    assert {name: component.version for name, component in components.items()} == locked
    for name, component in components.items():
        assert str(component.purl) == f"pkg:pypi/{name}@{locked[name].replace('+', '%2B')}"
        assert [reference.hashes for reference in component.external_references if reference.hashes]
        if not serving_lock.CUDA_ONLY.fullmatch(name):
            assert component.licenses, name


@pytest.mark.nightly
def test_sbom_is_cyclonedx_with_dependencies() -> None:
    bill: dict[str, Any] = json.loads(sbom.as_json(sbom.bill("cpu")))
    assert (bill["bomFormat"], bill["metadata"]["component"]["name"]) == ("CycloneDX", "img2img-server")
    needs = {one["ref"]: set(one.get("dependsOn", ())) for one in bill["dependencies"]}
    assert {"grpcio", "diffusers", "onnxruntime", "tritonclient"} <= needs["img2img-server"]
    assert "safetensors" in needs["diffusers"]


def test_invalid_sbom_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbom.JsonV1Dot6.output_as_string", lambda self, indent: '{"bomFormat": "CycloneDX"}')
    with pytest.raises(ValueError, match="not valid"):
        sbom.as_json(sbom.bill("cpu"))
