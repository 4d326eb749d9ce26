"""Modules that a server imports until it serves: counted, since seconds depend on the machine."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from img2img_cli.__main__ import COMMANDS
from img2img_client import Client
from PIL import Image
from server_process import Process

SHOW = "import atexit, sys; atexit.register(lambda: print('imported', *sorted(n for n, m in sys.modules.items() if m)))\n"
"""Has a process print the names of its modules when it ends."""

SERVE = f"{SHOW}from img2img_cli.__main__ import main; sys.exit(main())"

NEEDED = """\
import grpc, numpy, onnxruntime, PIL.Image, tokenizers, torch
from diffusers import DDIMScheduler
"""
"""The imports that an ONNX bundle of Stable Diffusion needs: tensors, a tokenizer and diffusers' schedulers."""

UNUSED = (
    *("onnx", "onnxscript", "optimum", "torchvision", "skimage", "scipy", "pandas", "matplotlib", "IPython"),
    *("torch._dynamo", "torch._inductor", "sympy", "transformers", "accelerate", "peft"),
    *(
        "diffusers.schedulers.scheduling_euler_discrete",
        "diffusers.models",
        "diffusers.loaders",
        "diffusers.pipelines.pipeline_utils",
    ),
    *("ray", "fastapi", "nicegui", "tritonclient", "opentelemetry", "prometheus_client", "aiohttp", "rich", "hypothesis"),
    *("img2img_export", "img2img_client", "img2img_playground"),
    *("starlette", "uvicorn", "httptools", "python_multipart", "img2img_server.api.http"),
    *("img2img_server.backends.ray", "img2img_server.api.kserve", "img2img_server.tools.top", "img2img_server.telemetry.metrics"),
)
"""Imports that only exports, clients, tests, disabled options, models in PyTorch, other schedulers and other backends need."""


def imported(output: str) -> set[str]:
    """The modules that a process with SHOW printed."""
    (line,) = (line for line in output.splitlines() if line.startswith("imported "))
    return set(line.split()[1:])


def run(code: str, *words: str) -> set[str]:
    """The modules of a process that runs this code."""
    done = subprocess.run([sys.executable, "-c", SHOW + code, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return imported(done.stdout)


def test_onnx_bundle_is_served_without_unneeded_packages(start: Callable[..., Process], bundle: Callable[[str], Path]) -> None:
    process = start("-c", SERVE, "serve", "--models", str(bundle("sd1")))
    with process.channel() as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)  # its stubs for mypy know no methods
        answer = health.Check(health_pb2.HealthCheckRequest(service="models/sd1"))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with Client(f"localhost:{process.port}", timeout=60) as client:
            client.transform(Image.new("RGB", (64, 64)), prompt="a lake " * 60, num_inference_steps=2)
    process.popen.send_signal(signal.SIGTERM)
    output, _ = process.popen.communicate(timeout=60)
    assert process.popen.returncode == 0, process.log
    served = imported(output)
    assert {"torch", "onnxruntime", "tokenizers", "img2img_server.runtime.loader"} <= served
    assert served.isdisjoint(UNUSED), served & set(UNUSED)
    packages = {name.partition(".")[0] for name in served} - {name.partition(".")[0] for name in run(NEEDED)}
    own = {name for name in packages if name not in sys.stdlib_module_names and not name.startswith(("_", "img2img"))}
    assert own <= {"fsspec", "google", "grpc_health", "grpc_reflection", "grpc_status", "isal", "platformdirs"}, "fsspec has isal"


@pytest.mark.parametrize("words", [["--help"], *([command, "--help"] for command in COMMANDS)], ids="-".join)
def test_help_imports_no_library_for_networks_or_metadata(words: list[str]) -> None:
    brought = run(f"from img2img_cli.__main__ import main\ntry: main({words})\nexcept SystemExit as end: assert not end.code")
    assert brought.isdisjoint({"asyncio", "ssl", "email", "importlib.metadata", "grpc", "google", "numpy", "torch"})


def test_version_flag_prints_the_version() -> None:
    command = [sys.executable, "-m", "img2img_cli", "--version"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    from img2img_server.support import distribution

    assert done.stdout == f"img2img {distribution.version()}\n"
