"""The command line: helpful, fast, and with an error for unknown arguments."""

import os
import subprocess
import sys

import pytest
from img2img_cli.__main__ import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: img2img {command}" in text
    assert "example" in text.lower(), "a reader learns by example"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize("words", [["nope"], ["serve", "--models", "m", "--nope"], ["export"], ["inspect"], ["--nope"]])
def test_unknown_arguments_are_errors(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    assert "usage: img2img" in capsys.readouterr().err


def test_closed_output_pipe_causes_no_traceback() -> None:
    code = """
import sys, types
import img2img_cli.__main__ as c
sys.modules["shout"] = types.SimpleNamespace(configure=lambda parser: None, run=lambda arguments: print("a line" * 10000) or 0)
c.COMMANDS["shout"] = ("shout", "much ado")
sys.exit(c.main(["shout"]))
"""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        result = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    finally:
        os.close(writing)
    assert (result.returncode, result.stderr) == (1, "")


def test_inspect_needs_no_extra() -> None:
    code = """
import sys
for name in ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "optimum", "huggingface_hub", "numpy", "skimage"):
    sys.modules[name] = None
import img2img_cli.__main__ as c
sys.exit(c.main(["inspect", "/nowhere"]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "img2img inspect: /nowhere is not a bundle: it has no manifest.json\n"


def test_a_missing_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['grpc'] = None; import img2img_cli.__main__ as c; sys.exit(c.main(['serve', '--models', '/']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "pip install 'img2img-server[server]'" in result.stderr


def test_an_unexpected_error_is_one_line_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from img2img_export.cli import export as command

    def fail(arguments: object) -> int:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(command, "run", fail)
    words = ["export", "model", "--output", "out"]
    assert main(words) == 1
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == (
        "",
        "img2img export: unexpected ZeroDivisionError: division (--verbose shows the traceback)\n",
    )
    with pytest.raises(ZeroDivisionError):
        main([*words, "--verbose"])
