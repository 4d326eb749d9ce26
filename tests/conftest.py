"""Fixtures that several packages' tests share: tiny models, and the bundles that the exporter makes of them.

Each is built at most once, whichever process (pytest-xdist's workers) first asks for it, and kept for later runs
(kept_bundles.py). Treat them as read-only: copy before you change one.
"""

import functools
import gc
import logging
import os
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import pytest
from kept_bundles import kept, place
from kept_sessions import keep_sessions

# Read by OpenMP when torch is loaded. Threads that spin while they wait make tiny models 20 times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Tiny models gain nothing from a second thread, and other tests need the core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# As our commands set them: no bars for weights, no notes on what torchvision would be for.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

REPOSITORY = Path(__file__).resolve().parents[1]
# OpenVINO's own tests (scripts/test --openvino) set this variable.
if "TESTS_WITH_OPENVINO" not in os.environ:
    HIDDEN = str(REPOSITORY / "tests" / "hidden")
    sys.path.insert(0, HIDDEN)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (HIDDEN, os.environ.get("PYTHONPATH"))))
    # Models in PyTorch compute in float32 on every machine: bfloat16 would be measured for each, and change its images.
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_VNNI"
DEMO_MODEL = REPOSITORY / "demo" / "model"
WITH_PREVIEWS = ("sd1", "sdxl", "flux-dev", "demo")
"""Bundles for which the export fits a preview."""
COMPARED = ("sd1", "kandinsky22")
"""Bundles for which the export compares all its images; for the others it compares two."""
WITHOUT_FURTHER_GRAPHS = (
    *("chroma", "flux", "flux-fill", "flux2", "if", "kolors", "lcm", "pix2pix", "sd-inpaint", "sd-masked", "sd-tiny-vae"),
    *("sd3-no-t5", "sdxl-inpaint", "sdxl-overflow", "sd1:fp16", "sd1:fp16:speedups", "sd1:bf16"),
    *("sd1:bf16:speedups", "sd1:int8", "sd1:int8:speedups"),
)
"""Bundles without graphs for LoRAs and ControlNets, which take half of an export; "lcm:fp32:further" has them. If
$TESTS_FURTHER_GRAPHS is set (scripts/test_versions), only the bundles that it names have such graphs."""
OF_TWO_SIZES = ("kandinsky3", "qwenimage2")
"""Bundles for which these two images differ in size: the exporter does not know the classes of their denoisers, and makes those
axes of a graph variable that differ between images."""


LONG = ("tests/test_readme.py", "tests/test_recipes.py", "tests/playground/test_in_a_browser.py")
"""Files whose tests take long. They run first, so that no process waits for them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Takes the imported libraries out of garbage collection: a million objects that each full collection would visit.

    An export asks for six of them, which were a third of its time; loading a single file spends two thirds in them.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> None:
    """Keeps what exports remember of files out of the user's cache, and the graphs that they trace beside the bundles."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["TESTS_TRACES"] = str(place(shared) / "traces")


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """Removes the log handler of a command that a test ran in this process: it writes to that test's captured output, which is
    closed before the next test."""
    root = logging.getLogger()
    level = root.level
    yield
    for handler in [handler for handler in root.handlers if type(handler).__module__ == "img2img_server.telemetry.logs"]:
        root.removeHandler(handler)
        root.setLevel(level)
        logging.captureWarnings(False)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of this session, the same in all its processes."""
    own = tmp_path_factory.getbasetemp()
    directory = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    directory.mkdir(exist_ok=True)
    return directory


@pytest.fixture(scope="session")
def tiny_model(shared: Path) -> Callable[[str], Path]:
    """Gives the directory of a tiny diffusers model by its name: a key of tiny_models.BUILDERS."""

    @functools.cache
    def get(name: str) -> Path:
        import tiny_models

        def build(output: Path) -> None:
            with TemporaryDirectory(dir=output.parent) as partial:
                tiny_models.build(name, Path(partial) / name).rename(output)

        return kept(shared, f"models/{name}", Path.is_dir, build)

    return get


@pytest.fixture(scope="session")
def bundle(shared: Path, tiny_model: Callable[[str], Path]) -> Callable[[str], Path]:
    """Gives the exported bundle of a tiny model by its name, or of the demo's model for "demo"; "sd1:fp16" is one in fp16, and
    "sd1:fp32:speedups" one with a light graph and a few speedups, but no LoRA graphs ("sd1:fp32:speedups+loras": with them),
    "sd3:fp32:int4" one with weights in int4, "flux:fp32:controls" one with control graphs, "klein:fp16:int4+hybrid" and
    "klein:fp32:hybrid" hybrids.

    Those of WITH_PREVIEWS have previews.
    """

    @functools.cache
    def get(name: str) -> Path:
        from img2img_export.build import export_model
        from img2img_export.options import ExportOptions
        from img2img_server.bundle.manifest import Precision, WeightFormat, check_bundle, read_manifest
        from img2img_server.errors import BundleError
        from short_exports import brief, cut_short, short_speedups, without_further_graphs

        keep_sessions()
        model, precision, more = (*name.split(":"), "", "")[:3]
        hybrid = more.endswith("hybrid")
        more = more.removesuffix("hybrid").removesuffix("+")
        speedups = more.startswith("speedups")
        source = DEMO_MODEL if model == "demo" else tiny_model(model)

        def good(directory: Path) -> bool:
            try:
                check_bundle(directory, read_manifest(directory))
            except BundleError:
                return False  # a test has changed it
            return True

        def export(output: Path) -> None:
            preview = name in WITH_PREVIEWS
            further = name not in WITHOUT_FURTHER_GRAPHS and name in os.environ.get("TESTS_FURTHER_GRAPHS", name).split()
            short = brief(preview) if name in COMPARED else cut_short(2, preview, name in OF_TWO_SIZES, further=True)
            options = ExportOptions(
                source=str(source),
                output=output,
                backend="hybrid" if hybrid else "auto",
                precision=cast(Precision, precision or "fp32"),
                lora_graphs=more != "speedups",
                control_graphs=more == "controls",
                speedups=speedups,
                weight_format=cast(WeightFormat, "" if speedups or more in ("controls", "further") else more),
            )
            with short, short_speedups(), nullcontext() if further else without_further_graphs():
                export_model(options)

        return kept(shared, f"bundles/{name.replace(':', '-')}", good, export)

    return get


@pytest.fixture(scope="session")
def tiny_controlnet(shared: Path, tiny_model: Callable[[str], Path]) -> Callable[[str], Path]:
    """Gives the directory of a tiny ControlNet: "sd1-a" is one for the tiny model "sd1", and "sd1-b" another;
    "sdxl-u" is a union, and "sd1-p" pools its residuals. "demo" is that of the demo's model."""

    @functools.cache
    def get(name: str) -> Path:
        import tiny_controlnets

        if name == "demo":
            return DEMO_MODEL.with_name("controlnet")
        model, _, letter = name.rpartition("-")
        build = functools.partial(tiny_controlnets.build, tiny_model(model), letter=letter)
        return kept(shared, f"controlnets/{name}", Path.is_dir, build)

    return get


@pytest.fixture(scope="session")
def control_bundle(shared: Path, tiny_controlnet: Callable[[str], Path]) -> Callable[[str], Path]:
    """Gives the exported bundle of a tiny ControlNet by its name."""
    return functools.cache(functools.partial(_companion_bundle, shared, "control-bundles", tiny_controlnet))


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test begins with an empty cache; `own_cache` is that of the whole session."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tiny_image_encoder(shared: Path) -> Callable[[str], Path]:
    """Gives the directory of a tiny CLIP image encoder: "h", or "g", which is wider."""

    @functools.cache
    def get(letter: str) -> Path:
        import tiny_image_encoders

        build = functools.partial(tiny_image_encoders.build, letter=letter)
        return kept(shared, f"image-encoders/{letter}", Path.is_dir, build)

    return get


@pytest.fixture(scope="session")
def image_encoder_bundle(shared: Path, tiny_image_encoder: Callable[[str], Path]) -> Callable[[str], Path]:
    """Gives the exported bundle of a tiny CLIP image encoder by its letter."""
    return functools.cache(functools.partial(_companion_bundle, shared, "image-encoder-bundles", tiny_image_encoder))


def _companion_bundle(shared: Path, folder: str, source: Callable[[str], Path], name: str) -> Path:
    """The exported bundle of a companion: its `source` by `name`."""
    from img2img_export.build import export_model
    from img2img_export.options import ExportOptions
    from img2img_server.bundle.manifest import MANIFEST_NAME
    from short_exports import brief

    def export(output: Path) -> None:
        with brief():
            export_model(ExportOptions(source=str(source(name)), output=output))

    return kept(shared, f"{folder}/{name}", lambda path: (path / MANIFEST_NAME).is_file(), export)
