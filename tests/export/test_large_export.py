"""Peak memory of an export whose largest component is much larger than the libraries: a transformer of 294 M parameters."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_models import MODELS
from img2img_server.bundle.manifest import read_manifest

_LIBRARIES = 0.9e9
"""Bytes that an export of a tiny model takes: libraries, sessions, graphs."""
_EXPORT = """
import json, resource, sys
from dataclasses import replace
from pathlib import Path
from img2img_export.build import export_model
from img2img_export.options import ExportOptions
from img2img_export.verify import images, latent_preview

cases = images.image_cases
def one(*arguments):
    case = cases(*arguments)[0]
    return (replace(case, request=replace(case.request, num_inference_steps=1)),)
images.image_cases, latent_preview.fit = one, lambda pipeline: ()
export_model(ExportOptions(sys.argv[1], Path(sys.argv[2]), lora_graphs=False))
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
"""


@pytest.mark.timeout(3600)
@pytest.mark.nightly  # needs 4 GB of disk and a quarter of an hour; tests/export/test_external_weights.py always runs
def test_peak_memory_is_about_that_of_the_largest_component(tmp_path: Path) -> None:
    """Including mapped files. One image in one step is compared, without which most of the time would pass."""
    torch.manual_seed(0)
    with torch.no_grad():
        MODELS["sd3-large"]().save_pretrained(tmp_path / "model", safe_serialization=True)
    words = [sys.executable, "-c", _EXPORT, str(tmp_path / "model"), str(tmp_path / "bundle")]
    peak = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    manifest = read_manifest(tmp_path / "bundle")
    transformer = next(part for part in manifest.components if part.name == "transformer")
    assert manifest.backend == "onnx"
    assert transformer.bytes > 4 * 290e6
    print(f"{transformer.bytes / 1e9:.2f} GB of weights, peak {peak / 1e9:.2f} GB resident")
    assert peak < 2.2 * transformer.bytes + _LIBRARIES
