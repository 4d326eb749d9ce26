"""`scripts/bench host` prints its table and its profile for a tiny model."""

import argparse
from collections.abc import Callable
from pathlib import Path

import bench_host
import pytest
import torch


@pytest.mark.usefixtures("gpu")
def test_bench_host_prints_its_table(
    bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "isfinite", torch.isfinite)  # the benchmark replaces it
    monkeypatch.setattr(bench_host, "_REQUESTS", (1, 8))
    parser = argparse.ArgumentParser()
    bench_host.configure(parser)
    words = ["--bundle", str(bundle("sd1")), "--steps", "4", "--step-ms", "0.1", "--profile"]
    assert bench_host.run(parser.parse_args(words)) == 0
    printed = capsys.readouterr().out
    assert "device idle" in printed
    assert "frames from the engine's loop to a session's run: _run" in printed
    assert "cumulative" in printed
