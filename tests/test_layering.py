"""The rules of the house, each tried in a fresh interpreter: who may import what, and what answers quickly."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "onnxruntime", "diffusers", "transformers", "optimum", "onnx", "grpc")

RULES = [
    # module, what its import must not bring in
    ("img2img_server.errors", (*HEAVY, "numpy", "PIL", "google")),
    ("img2img_server.device", (*HEAVY, "numpy", "PIL", "google")),
    ("img2img_server.distribution", (*HEAVY, "numpy", "PIL", "google", "email")),
    ("img2img_server.bundle", (*HEAVY, "numpy", "PIL", "google")),
    ("img2img_server.settings.setting", (*HEAVY, "numpy", "PIL", "google")),
    ("img2img_server.settings.sources", (*HEAVY, "numpy", "PIL", "google")),
    ("img2img_server.images", HEAVY),
    ("img2img_server.config", (*HEAVY, "numpy")),
    ("img2img_server.codecs.worker", (*HEAVY, "google", "asyncio")),
    ("img2img_server.codecs.pool", HEAVY),
    ("img2img_server.codecs.fairness", (*HEAVY, "numpy", "PIL", "google")),
    ("img2img_server.models.store", HEAVY),
    ("img2img_server.models.residency", HEAVY),
    ("img2img_server.models.acquiring", HEAVY),
    ("img2img_server.assets.store", (*HEAVY, "aiohttp", "fsspec")),
    ("img2img_server.sources.reading", (*HEAVY, "aiohttp", "fsspec")),
    ("img2img_server.models.exporting", (*HEAVY, "numpy", "PIL", "google")),
    ("img2img_server.low_priority", (*HEAVY, "numpy", "PIL", "google")),
    ("img2img_server.access.tokens", (*HEAVY, "numpy", "PIL", "google")),
    ("img2img_server.access.command", (*HEAVY, "numpy", "PIL", "google")),
    ("img2img_server.access.access", (*HEAVY, "numpy", "PIL", "google")),
    ("img2img_server.stopping", (*HEAVY, "numpy", "PIL", "google")),
    ("img2img_server.models.takeover", HEAVY),
    ("img2img_server.engine.request", HEAVY),
    ("img2img_server.engine.scheduler", HEAVY),
    ("img2img_server.engine.engine", HEAVY),
    ("img2img_server.backend", (*HEAVY, "ray")),
    ("img2img_server.wiring", (*HEAVY, "ray")),
    ("img2img_server.cluster.front", (*HEAVY, "ray")),
    ("img2img_server.cluster.models", (*HEAVY, "ray")),
    ("img2img_server.cluster.replica", (*HEAVY, "ray")),
    ("img2img_server.cluster.serving", (*HEAVY, "ray")),
    ("img2img_server.cluster.choosing", (*HEAVY, "ray", "numpy", "PIL", "google")),
    ("img2img_server.cluster.scaling", (*HEAVY, "ray", "numpy", "PIL", "google")),
    ("img2img_server.cluster.sharing", (*HEAVY, "ray")),
    ("img2img_server.cluster.routing", tuple(name for name in HEAVY if name != "grpc")),
    ("img2img_server.cluster.calling", tuple(name for name in HEAVY if name != "grpc")),
    ("img2img_server.cluster.deploying", tuple(name for name in HEAVY if name != "grpc")),
    (
        "img2img_server.server",
        (
            *("ray", "torch", "onnxruntime", "diffusers", "transformers", "optimum", "onnx"),
            *("opentelemetry", "prometheus_client", "tritonclient"),
        ),
    ),
    ("img2img_server.kserve.extra", (*HEAVY, "numpy", "PIL", "google")),
    ("img2img_server.kserve.service", ("ray", "torch", "onnxruntime", "diffusers", "transformers", "optimum", "onnx")),
    ("img2img_server.life", ("torch", "onnxruntime", "diffusers", "transformers", "optimum", "onnx")),
    ("img2img_server.__main__", (*HEAVY, "numpy", "PIL", "google", "asyncio", "email")),
    ("img2img_server.bench_command", (*HEAVY, "numpy", "PIL", "google", "rich")),
    ("img2img_server.top.command", (*HEAVY, "numpy", "PIL", "google", "rich", "prometheus_client")),
    ("img2img_server.telemetry.logs", (*HEAVY, "numpy", "PIL", "google")),
    ("img2img_server.telemetry.telemetry", (*HEAVY, "opentelemetry", "prometheus_client")),
    ("img2img_server.telemetry.gauges", (*HEAVY, "opentelemetry")),
    ("img2img_server.pipelines.loader", ("grpc",)),
    ("img2img_server.pipelines.build_process", (*HEAVY, "numpy", "PIL", "google")),
    ("img2img_server.pipelines.engine_cache", (*HEAVY, "numpy", "PIL", "google")),
    ("img2img_server.pipelines.tensorrt_contender", ("grpc",)),
    ("img2img_export.command", (*HEAVY, "numpy", "PIL", "google")),
    ("img2img_export.inspect_command", (*HEAVY, "numpy", "PIL", "google", "rich")),
    ("img2img_client", ("torch", "onnxruntime", "diffusers", "transformers", "optimum", "onnx", "numpy")),
    ("img2img_client.transform_command", HEAVY),
    ("img2img_client.models_command", HEAVY),
    ("img2img_client.health_command", HEAVY),
    ("img2img_client.assets_command", HEAVY),
    ("img2img_client.client", (*(name for name in HEAVY if name != "grpc"), "numpy", "PIL", "opentelemetry")),
    ("img2img_client.async_client", (*(name for name in HEAVY if name != "grpc"), "numpy", "PIL", "opentelemetry")),
    ("img2img_playground.command", (*HEAVY, "numpy", "PIL", "google", "rich", "nicegui", "fastapi")),
    ("img2img_playground.snippet", (*HEAVY, "numpy", "PIL", "google", "nicegui", "fastapi")),
    ("img2img_playground.session", ("torch", "onnxruntime", "diffusers", "optimum", "numpy", "nicegui", "fastapi")),
    ("img2img_cli.__main__", (*HEAVY, "numpy", "PIL", "google", "rich", "asyncio", "email")),
]


def fresh(code: str) -> str:
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=120, cwd="/")
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(("module", "forbidden"), RULES, ids=[module for module, _ in RULES])
def test_a_module_imports_only_what_lies_below_it(module: str, forbidden: tuple[str, ...]) -> None:
    loaded = set(fresh(f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))").split())
    assert module.split(".")[0] in loaded
    assert loaded.isdisjoint(forbidden), sorted(loaded & set(forbidden))


def test_serving_does_not_need_the_export_stack() -> None:
    """With optimum and onnx out of reach, the server's pipelines still import."""
    code = "import sys; sys.modules['optimum'] = sys.modules['onnx'] = None; import img2img_server.pipelines.loader"
    fresh(code)


def test_nothing_of_the_servers_names_optimum_or_the_exporter() -> None:
    for path in (Path(__file__).parents[1] / "server").rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not line.strip().startswith(
                ("import optimum", "from optimum", "import img2img_export", "from img2img_export")
            ), path


def test_the_exporter_knows_nothing_of_grpc() -> None:
    for path in (Path(__file__).parents[1] / "export").rglob("*.py"):
        assert "grpc" not in path.read_text(encoding="utf-8"), path


def test_folders_of_the_checkout_are_no_modules() -> None:
    code = "import importlib.util as u; print([n for n in ('server', 'export', 'client', 'cli', 'protos') if u.find_spec(n)])"
    assert fresh(code).strip() == "[]"
