"""From the flags of `img2img serve` to an Execution: what the operator says is what models are run with."""

import argparse
from pathlib import Path

import pytest
from img2img_server.__main__ import _execution, configure
from img2img_server.execution import PROVIDERS, Bucket, Execution


def _parse(*words: str) -> Execution:
    parser = argparse.ArgumentParser()
    configure(parser)
    return _execution(parser.parse_args(["--models", "m", *words]))


def test_without_flags_all_is_left_to_the_machine() -> None:
    assert _parse() == Execution()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        *((f"--provider {name}", Execution(name)) for name in ("auto", *PROVIDERS)),
        ("--threads 3", Execution(threads=3)),
        ("--arithmetic fp32", Execution(arithmetic="fp32")),
        ("--buckets 512x768:4,64x64", Execution(buckets=(Bucket(512, 768, 4), Bucket(64, 64, 2)))),
        ("--buckets none", Execution(buckets=())),
        ("--gpu-memory 1000", Execution(gpu_memory=1000)),
        ("--no-cuda-graphs", Execution(cuda_graphs=False)),
        ("--compile", Execution(compile=True)),
        ("--engine-cache there", Execution(cache=Path("there"))),
    ],
)
def test_each_flag_is_a_setting(words: str, expected: Execution) -> None:
    assert _parse(*words.split()) == expected


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--provider gpu", "invalid choice: 'gpu'"),
        ("--buckets 512", "'512' is no WIDTHxHEIGHT:ROWS, such as 512x512:2"),
        ("--buckets 64x64:0", "'64x64:0' is no WIDTHxHEIGHT:ROWS"),
        ("--arithmetic bf16", "invalid choice: 'bf16'"),
    ],
)
def test_what_makes_no_sense_is_told_of(words: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        _parse(*words.split())
    assert ended.value.code == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--threads 0", "--gpu-memory 0"])
def test_a_number_that_cannot_work_is_refused(words: str) -> None:
    with pytest.raises(ValueError, match="the least is 1"):
        _parse(*words.split())
