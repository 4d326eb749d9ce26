"""Bundles that are damaged, before they are loaded and while they are served, and a model that computes nonsense."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from chaos import DAMAGES, flip, is_right, source, truncate
from img2img_client import Client, Img2ImgError
from img2img_client.values import ModelReference
from img2img_server.bundle.manifest import MANIFEST_NAME, digest_files, list_files, read_manifest, write_manifest
from img2img_server.engine.cache import Cache
from img2img_server.models.registry import ModelRegistry
from img2img_server.runtime.execution import Execution
from running import running
from soak_parts.process import SERVE, STAND_IN, serving
from soak_parts.stand_in import plant

SECONDS = 120.0


def test_a_damaged_bundle_is_refused_while_the_others_are_served(tmp_path: Path) -> None:
    store, names = tmp_path / "models", {f"damaged{number}": name for number, name in enumerate(DAMAGES)}
    plant(store, "good")
    for model, name in names.items():
        DAMAGES[name](plant(store, model))
    flags = ["--models", str(store), "--default-model", "good", "--warm-up", "0", "--assets", "none"]
    with serving(tmp_path, [*STAND_IN, *flags]) as server, Client(server.target, timeout=SECONDS, retries=None) as client:
        (image,) = client.transform(source(1), prompt="p", seed=1, num_inference_steps=4).images
        assert is_right(image.data, source(1), "p", 1, 4)
        for model, name in names.items():
            with pytest.raises(Img2ImgError) as caught:
                client.transform(source(1), model=ModelReference(path=model))
            assert caught.value.status in ("FAILED_PRECONDITION", "NOT_FOUND"), name
            assert str(tmp_path) not in str(caught.value)
        states = {model.id: model.state for model in client.models()}
        assert {name: states.get(model, "failed") for model, name in names.items()} == dict.fromkeys(names.values(), "failed")


def test_loaded_bundle_keeps_working_if_its_files_are_damaged(bundle: Callable[[str], Path], tmp_path: Path) -> None:
    """Files that are flipped, cut and missing take the place of those of which a server drew an image: the next one is the same.

    ONNX Runtime maps the weights, so a file that is written in place is not what this promises.
    """

    def replace_by_damaged(path: Path, damage: Callable[[Path], object]) -> None:
        other = tmp_path / "damaged"
        shutil.copyfile(path, other)
        damage(other)
        if other.exists():
            other.replace(path)
        else:
            path.unlink()

    copy = tmp_path / "models" / "m"
    shutil.copytree(bundle("sd1"), copy)
    flags = ["--models", str(copy.parent), "--warm-up", "0", "--assets", "none", "--cache-bytes", "0"]
    with serving(tmp_path, [*SERVE, *flags]) as server, Client(server.target, timeout=SECONDS, retries=None) as client:

        def draw() -> bytes:
            return client.transform(source(1), prompt="p", seed=1, num_inference_steps=4).images[0].data

        before = draw()
        for damage in (flip, truncate, Path.unlink):
            for path in [each for each in copy.rglob("*") if each.is_file() and each.stat().st_size > 1]:
                replace_by_damaged(path, damage)
            assert draw() == before
        server.terminate()
        assert server.wait(SECONDS) == 0


def test_non_finite_values_are_an_error_not_an_image(bundle: Callable[[str], Path], tmp_path: Path) -> None:
    """Its decoder returns NaN; a black image would look like a result."""
    from img2img_server.runtime.loader import load_pipeline

    copy = tmp_path / "models" / "m"
    shutil.copytree(bundle("sd1"), copy)
    path = copy / "vae_decoder" / "model.onnx"
    graph = onnx.load(path)
    weight = next(each for each in graph.graph.initializer if each.name.endswith("conv_out.bias"))
    weight.CopyFrom(onnx.numpy_helper.from_array(np.full(weight.dims, np.nan, np.float32), weight.name))
    onnx.save(graph, path)
    manifest = read_manifest(copy)
    (copy / MANIFEST_NAME).unlink()
    manifest.files.update(digest_files(copy, list_files(copy)))
    write_manifest(copy, manifest)

    def load() -> ModelRegistry:
        return ModelRegistry.load(copy.parent, lambda folder, found: load_pipeline(folder, found, Execution(), Cache(0)))

    with running(load) as server, Client(f"127.0.0.1:{server.port}", timeout=SECONDS, retries=None) as client:
        for _ in range(2):
            with pytest.raises(Img2ImgError) as caught:
                client.transform(source(1), prompt="p", seed=1, num_inference_steps=2)
            assert (caught.value.status, caught.value.reason) == ("INTERNAL", "MODEL_FAILED")
        assert client.models()[0].state == "ready"
