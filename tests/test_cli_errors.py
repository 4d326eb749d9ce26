"""Errors of the command line: unknown arguments, unusable files and missing extras."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import DEMO_MODEL
from img2img_cli.__main__ import COMMANDS, main
from img2img_server.tools import demo

CLIENT = ("transform", "models", "health", "assets", "top", "token", "inspect")
"""Commands that need no extra."""
SERVER_ONLY = (
    *(
        "torch",
        "diffusers",
        "transformers",
        "onnx",
        "onnxruntime",
        "optimum",
        "huggingface_hub",
        "numpy",
        "skimage",
        "accelerate",
    ),
    *("aiohttp", "fsspec", "grpc_health", "grpc_reflection", "safetensors", "sentencepiece", "nicegui", "ray", "tritonclient"),
)
"""The packages that only the extras install."""


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The last line of the error that a wrong command line ends with, which has status 2."""
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        (["srve"], "did you mean 'serve'?"),
        (["transfrom", "a.png"], "did you mean 'transform'?"),
        (["--verison"], "did you mean '--version'?"),
        (["serve", "--max-batchsize", "8"], "did you mean '--max-batch-size'?"),
        (["serve", "--models", "m", "--max-batchsize=8"], "did you mean '--max-batch-size'?"),
        (["export", "--precison", "fp16"], "did you mean '--precision'?"),
        (["inspect", "--jsn"], "did you mean '--json'?"),
        (["transform", "--promt", "a lake"], "did you mean '--prompt'?"),
        (["models", "--schedular"], "did you mean '--schedulers'?"),
        (["health", "--timout", "3"], "did you mean '--timeout'?"),
        (["top", "--windw", "3"], "did you mean '--window'?"),
        (["bench-model", "--provders", "cpu"], "did you mean '--providers'?"),
        (["playground", "--prot", "1"], "did you mean '--port'?"),
        (["token", "ad", "alice"], "did you mean 'add'?"),
        (["token", "add", "alice", "--concurency", "4"], "did you mean '--concurrency'?"),
        (["assets", "uplaod", "a.png"], "did you mean 'upload'?"),
        (["assets", "upload", "a.png", "--targt", "x"], "did you mean '--target'?"),
        (["serve", "--models", "m", "--provider", "openvno"], "did you mean 'openvino'?"),
        (["serve", "--models", "m", "--log-format", "jsn"], "did you mean 'json'?"),
    ],
)
def test_misspelt_argument_gets_a_suggestion(words: list[str], suggestion: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert suggestion in complaint(capsys, *words)


def test_unrelated_argument_gets_no_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean" not in complaint(capsys, "health", "--qqqqqq")
    assert "commands: export, inspect, serve" in complaint(capsys, "qqqqqq")


def test_values_and_arguments_after_two_dashes_are_not_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unrecognized" not in complaint(capsys, "transform", "--", "--nope", "more")
    assert "did you mean" not in complaint(capsys, "transform", "--prompt", "--a lake")


def test_abbreviated_flag_is_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path), "--js"]) == 1
    assert "unrecognized" not in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["token"], ["assets"]])
def test_command_without_its_subcommand_prints_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: img2img")
    assert "example" in out or "first steps" in out
    assert err == ""


def test_every_command_reports_misspelt_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("IMG2IMG_TARGT", "elsewhere:1")
    main(["inspect", str(tmp_path)])
    assert "ignoring the unknown variable IMG2IMG_TARGT; did you mean 'IMG2IMG_TARGET'?" in capsys.readouterr().err
    monkeypatch.delenv("IMG2IMG_TARGT")
    monkeypatch.setenv("IMG2IMG_PORT", "1")
    main(["inspect", str(tmp_path)])
    assert "unknown" not in capsys.readouterr().err, "a setting of the server is no mistake"


def client_install(code: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` where nothing of the extras can be imported."""
    without = f"import sys\nfor name in {SERVER_ONLY!r}:\n    sys.modules[name] = None\n"
    code = without + "from img2img_cli.__main__ import main\n" + code
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_on_a_client_install(command: str) -> None:
    result = client_install(f"main([{command!r}, '--help'])")
    assert result.returncode == 0, result.stderr
    assert f"usage: img2img {command}" in result.stdout


@pytest.mark.parametrize("command", CLIENT)
def test_client_install_runs_commands_without_a_model(command: str, tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    words = {
        "transform": [str(image), "--output", str(tmp_path / "b.png"), "--target", "localhost:1", "--timeout", "0.1"],
        "models": ["--target", "localhost:1", "--timeout", "0.1"],
        "health": ["--target", "localhost:1", "--timeout", "0.1"],
        "assets": ["upload", str(image), "--target", "localhost:1", "--timeout", "0.1"],
        "top": ["http://localhost:1/metrics", "--once"],
        "token": ["add", "alice", "--tokens", str(tmp_path / "tokens.toml")],
        "inspect": [str(tmp_path)],
    }[command]
    code = "from PIL import Image\n" + f"Image.new('RGB', (8, 8)).save({str(image)!r})\nsys.exit(main({[command, *words]!r}))"
    result = client_install(code)
    assert result.returncode == (0 if command == "token" else 1), result.stderr
    assert "Traceback" not in result.stderr
    assert "pip install" not in result.stderr


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["export", "MODEL", "--output", "o"], "export"),
        (["bench-model", "BUNDLE"], "server"),
        (["playground"], "playground"),
        (["serve", "--models", "BUNDLE"], "server"),
    ],
)
def test_other_commands_name_the_missing_extra(
    words: list[str], extra: str, tmp_path: Path, bundle: Callable[[str], Path]
) -> None:
    paths = {"MODEL": str(DEMO_MODEL), "BUNDLE": str(bundle("demo")), "o": str(tmp_path / "o")}
    result = client_install(f"sys.exit(main({[paths.get(word, word) for word in words]!r}))")
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert f"pip install 'img2img-server[{extra}]'" in result.stderr


def test_unusable_file_is_named_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = tmp_path / "gone"
    for words, why in (
        (["token", "add", "alice", "--tokens", str(gone / "t")], f"{gone / 't'} cannot be used: No such file"),
        (["serve", "--config", str(gone)], f"{gone}: No such file or directory"),
        (["inspect", str(gone)], f"{gone} is not a bundle"),
        (["transform", str(gone / "a.png"), "--output", str(tmp_path / "b.png")], f"{gone / 'a.png'}: No such file"),
    ):
        assert main(words) in (1, 2)
        err = capsys.readouterr().err
        assert why in err
        assert len(err.strip().splitlines()) == 1


def test_unexpected_disk_error_is_one_line() -> None:
    code = """
import sys, types
import img2img_cli.__main__ as c
def run(arguments):
    with open("/dev/full", "w") as file:
        file.write("x" * 100000)
sys.modules["shout"] = types.SimpleNamespace(configure=lambda parser: None, run=run)
c.COMMANDS["shout"] = ("shout", "much ado")
sys.exit(c.main(["shout"]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (1, "img2img shout: No space left on device\n")


# The demo model.


def test_demo_exports_its_model_once_and_serves_it_from_then_on(tmp_path: Path, bundle: Callable[[str], Path]) -> None:
    said: list[str] = []
    exported: list[tuple[Path, Path]] = []

    def export(model: Path, output: Path) -> int:
        exported.append((model, output))
        output.symlink_to(bundle("demo"))
        return 0

    for _ in range(2):
        assert demo.obtain(said.append, tmp_path / "kept", export) == tmp_path / "kept" / "demo"
    ((model, output),) = exported
    assert (model / "model_index.json").is_file()
    assert output == tmp_path / "kept" / "demo"
    assert "exporting the demo model" in said[0]
    assert str(output) in said[0]
    assert "serving the demo model" in said[1]


def test_failed_demo_export_is_reported(tmp_path: Path) -> None:
    with pytest.raises(demo.DemoUnavailable, match="failed with status 3"):
        demo.obtain(lambda line: None, tmp_path, lambda model, output: 3)
    (tmp_path / "file").write_text("")
    with pytest.raises(demo.DemoUnavailable, match=r"cannot be created: (Not a directory|File exists)"):
        demo.obtain(lambda line: None, tmp_path / "file", lambda model, output: 0)


def test_outside_a_checkout_demo_reports_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "find_model", lambda: None)
    assert main(["serve"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("img2img serve: models is not set: give --models DIR")
    assert "img2img export MODEL --output models/NAME" in line
    assert main(["serve", "--port", "0", "--tls-key", "k"]) == 2
    assert "tls_certificate and tls_key must be set together" in capsys.readouterr().err, "before anything is exported"


def test_missing_exporter_is_reported_with_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "_NEEDED", ("torch", "a_package_that_is_not_installed"))
    assert main(["serve"]) == 2
    err = capsys.readouterr().err
    assert "needs a_package_that_is_not_installed: pip install 'img2img-server[server,export]'" in err
