"""Packages that an import must not load, tested in a fresh interpreter; no circles, and one name for one class. Import rules
between our packages are in pyproject.toml (import-linter)."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from graphlib import TopologicalSorter

import grimp
import pytest
from conftest import REPOSITORY

PACKAGES = ("img2img_server", "img2img_export", "img2img_client", "img2img_playground", "img2img_cli")

HEAVY = ("torch", "onnxruntime", "diffusers", "transformers", "optimum", "onnx", "grpc")

LIGHT = (*HEAVY, "numpy", "PIL", "google")

RULES = [
    # module, what its import must not bring in: commands answer at once, and processes without a model stay small
    ("img2img_cli.__main__", (*LIGHT, "rich", "asyncio", "email")),
    ("img2img_server.__main__", (*LIGHT, "asyncio", "email")),
    (
        "img2img_server.api.server",
        tuple(name for name in (*HEAVY, "ray", "opentelemetry", "prometheus_client", "tritonclient") if name != "grpc"),
    ),
    ("img2img_server.backends.local", (*HEAVY, "ray")),
    ("img2img_server.backends.ray.replica", (*HEAVY, "ray")),
    ("img2img_server.codecs.worker", (*HEAVY, "google", "asyncio")),
    ("img2img_server.runtime.tensorrt.build", LIGHT),
    ("img2img_server.tools.top", (*LIGHT, "rich", "prometheus_client")),
    ("img2img_export.cli.export", LIGHT),
    ("img2img_client.client", (*(name for name in HEAVY if name != "grpc"), "numpy", "PIL", "opentelemetry")),
    ("img2img_playground.command", (*LIGHT, "rich", "nicegui", "fastapi")),
]


def fresh(code: str) -> str:
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=120, cwd="/")
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(("module", "forbidden"), RULES, ids=[module for module, _ in RULES])
def test_module_imports_no_forbidden_package(module: str, forbidden: tuple[str, ...]) -> None:
    loaded = set(fresh(f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))").split())
    assert module.split(".")[0] in loaded
    assert loaded.isdisjoint(forbidden), sorted(loaded & set(forbidden))


def test_serving_does_not_need_the_export_stack() -> None:
    """With optimum and onnx out of reach, the server's pipelines still import."""
    code = "import sys; sys.modules['optimum'] = sys.modules['onnx'] = None; import img2img_server.runtime.loader"
    fresh(code)


def test_folders_of_the_checkout_are_not_importable() -> None:
    code = "import importlib.util as u; print([n for n in ('server', 'export', 'client', 'cli', 'protos') if u.find_spec(n)])"
    assert fresh(code).strip() == "[]"


def test_imports_of_modules_have_no_circle() -> None:
    """Within and across the packages, with the imports in functions and those for type checking only."""
    graph = grimp.build_graph(*PACKAGES)
    TopologicalSorter({module: graph.find_modules_directly_imported_by(module) for module in graph.modules}).prepare()


def test_public_classes_of_the_server_have_names_of_their_own() -> None:
    trees = [ast.parse(path.read_bytes()) for path in (REPOSITORY / "server" / "img2img_server").rglob("*.py")]
    names = Counter(node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1 and not name.startswith("_")] == []


def test_drawing_of_the_server_has_its_packages_in_the_order_of_their_layers() -> None:
    """docs/architecture.md: the rows of the drawing are the layers of import-linter's contract, and each subpackage is in it."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = (one for one in project["tool"]["importlinter"]["contracts"] if one.get("containers") == ["img2img_server"])
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.split("\n[├└].*", page.partition("┌")[2].partition("\n```")[0])
    drawn = [re.findall(r"│ (\w+)(?: \([^│]*)?[:,]", row) for row in rows]
    assert drawn == [layer.split(" | ") for layer in contract["layers"] if layer != "__main__"] + [[]]
    folders = (path.parent for path in (REPOSITORY / "server" / "img2img_server").glob("*/*/__init__.py"))
    subpackages = {(path.parent.name, path.name) for path in folders}
    inside = [re.findall(r"│ (\w+) \(([^)]*)\)", re.sub(r",? *│[^│\n]*│\n│ *", ", ", row)) for row in rows]
    assert {(name, part) for found in inside for name, parts in found for part in parts.split(", ")} == subpackages
