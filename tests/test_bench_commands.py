"""Commands of `scripts/bench` that need no real-size model or GPU print their table on a small workload."""

import argparse
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import bench_attention
import bench_export
import bench_growth
import bench_http
import bench_padding
import bench_ray
import bench_request
import bench_rounding
import bench_schedulers
import bench_sessions
import bench_simulated
import bench_speedups
import bench_start
import pytest
from bench_load import command as bench_load
from bench_load import measuring, servers


@pytest.mark.parametrize(
    ("module", "words", "printed"),
    [
        (bench_attention, ["--heads", "1", "--blocks", "1", "--sides", "8", "--rounds", "1"], "│ 64"),
        (bench_growth, ["--waiting", "50", "100", "--times", "3"], "a client each"),
        (bench_http, ["--requests", "2", "--sizes", "64"], "64 x 64"),
        (bench_padding, ["--heads", "1", "--blocks", "1", "--sides", "8", "--rounds", "1"], "│ equal"),
        pytest.param(
            bench_request, ["--requests", "1", "--starts", "1"], "request through the server", marks=pytest.mark.nightly
        ),
        (bench_rounding, ["--timesteps", "501"], "501"),
        (bench_schedulers, ["--requests", "2", "--rounds", "1"], "DPM++ 2M Karras"),
        pytest.param(bench_sessions, ["--rounds", "1", "--requests", "1"], "ONNX Runtime's default", marks=pytest.mark.nightly),
        (bench_simulated, ["--requests", "200"], "batching"),
        pytest.param(bench_start, ["--models", "1", "--rounds", "1"], "MiB at SERVING", marks=pytest.mark.nightly),
        (bench_speedups, ["--rounds", "1", "--steps", "8"], "less work"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, ModuleType) else "",
)
def test_bench_command_prints_its_table(
    module: ModuleType,
    words: list[str],
    printed: str,
    bundle: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if hasattr(module, "RESULT"):
        monkeypatch.setattr(module, "ROOT", tmp_path)
        monkeypatch.setattr(module, "RESULT", tmp_path / ".bench" / "result.json")
    parser = argparse.ArgumentParser()
    module.configure(parser)
    if hasattr(module, "BUNDLE"):
        words = [*words, "--bundle", str(bundle("sd1:fp32:speedups" if module is bench_speedups else "sd1"))]
    assert module.run(parser.parse_args(words)) == 0
    assert printed in capfd.readouterr().out


@pytest.mark.nightly
def test_bench_ray_prints_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Every server has its own engine: a cluster takes long to start (server/test_ray_cluster.py has one)."""
    server = bench_ray._server
    monkeypatch.setattr(bench_ray, "_server", lambda settings, ray, device: server({**settings, "engine": "local"}, {}, device))
    monkeypatch.setattr(bench_ray, "_calls", lambda address, data, count: [1.0] * (bench_ray._WARM + count))
    monkeypatch.setattr(bench_ray, "RESULT", tmp_path / ".bench" / "ray.json")
    parser = argparse.ArgumentParser()
    bench_ray.configure(parser)
    words = ["--requests", "2", "--replicas", "1", "--clients", "2", "--seconds", "0.1"]
    assert bench_ray.run(parser.parse_args(words)) == 0
    printed = capfd.readouterr().out
    assert "added by Ray, round by round, ms, median" in printed
    assert "1 on Ray, requests/s" in printed


def test_bench_load_prints_its_table(
    bundle: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = bundle("sd1")
    monkeypatch.setattr(bench_load, "FOLDER", tmp_path)
    monkeypatch.setattr(measuring, "CALIBRATION_JOBS", 2)
    monkeypatch.setattr(measuring, "command", lambda name: servers.command(name, bundle=folder))
    parser = argparse.ArgumentParser()
    bench_load.configure(parser)
    words = ["--servers", "ours", "--workloads", "alone", "--seconds", "0.1", "--rounds", "1"]
    assert bench_load.run(parser.parse_args(words)) == 0
    assert "1 client, the default transform" in capfd.readouterr().out
    assert (tmp_path / "load.json").is_file()
    assert (tmp_path / "load.png").is_file()


@pytest.mark.nightly
def test_bench_export_prints_its_table(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_export, "_BENCH", tmp_path)
    monkeypatch.setattr(bench_export, "_CASES", {"tiny": ("tiny", "fp32")})
    monkeypatch.setattr(bench_export, "saved_model", lambda name, precision: tiny_model("sd1"))
    parser = argparse.ArgumentParser()
    bench_export.configure(parser)
    assert bench_export.run(parser.parse_args(["tiny"])) == 0
    printed = capfd.readouterr().out
    assert "peak resident" in printed
    assert "comparing images" in printed, "each stage has a line"
    assert not (tmp_path / "bundles" / "tiny").exists()
