"""The command line of `img2img serve`: flags, their errors, and `--print-config`."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
from img2img_cli.__main__ import main
from img2img_server.__main__ import configure, configured
from img2img_server.config import ServerConfig
from img2img_server.engine.scheduler import QueueLimits
from img2img_server.images import ImageLimits
from img2img_server.runtime.execution import PROVIDERS, Bucket, Execution
from test_layering import HEAVY


def _parse(*words: str, **variables: str) -> ServerConfig:
    parser = argparse.ArgumentParser()
    configure(parser)
    return configured(parser.parse_args(["--models", "m", *words]), variables).config


def _complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one-line error of `img2img serve` for invalid arguments."""
    try:
        status = main(["serve", *words])
    except SystemExit as ended:
        status = int(ended.code or 0)
    said = capsys.readouterr().err
    usage, _, line = said.rpartition("usage: ")[2].rpartition("error: ")
    assert (status, usage.count("\n"), line.count("\n")) == (2, 1 if usage else 0, 1)
    return line.removeprefix("img2img serve: ").strip()


def test_flag_defaults_match_the_configuration() -> None:
    assert _parse() == ServerConfig(Path("m"))


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
        ("--no-compile", Execution()),
        ("--engine-cache there", Execution(cache=Path("there"))),
    ],
)
def test_execution_flags_set_the_execution_settings(words: str, expected: Execution) -> None:
    assert _parse(*words.split()).execution == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--default-model x --host h --port 0", ServerConfig(Path("m"), default_model="x", host="h", port=0)),
        ("--port-file f --grace 5 --warm-up 0", ServerConfig(Path("m"), port_file=Path("f"), grace=5, warm_up=0)),
        ("--max-batch-size 2 --max-waiting 3", ServerConfig(Path("m"), limits=QueueLimits(max_batch_size=2, max_waiting=3))),
        (
            "--cache-bytes 0 --trace t --allow-unverified",
            ServerConfig(Path("m"), cache_bytes=0, trace=Path("t"), allow_unverified=True),
        ),
        (
            "--max-steps 7 --max-image-bytes 8 --max-pixels 9",
            ServerConfig(Path("m"), max_steps=7, image_limits=ImageLimits(max_bytes=8, max_pixels=9)),
        ),
    ],
)  # fmt: skip
def test_flags_of_earlier_releases_still_work(words: str, expected: ServerConfig) -> None:
    assert _parse(*words.split()) == expected


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--provider gpu", "--provider is 'gpu', expected one of auto, tensorrt, cuda, openvino, cpu"),
        ("--buckets 512", "--buckets '512' is not WIDTHxHEIGHT:ROWS, such as 512x512:2"),
        ("--buckets 64x64:0", "--buckets '64x64:0' is not WIDTHxHEIGHT:ROWS, such as 512x512:2"),
        ("--arithmetic bf16", "--arithmetic is 'bf16', expected one of auto, fp32"),
        ("--threads 0", "--threads is 0, the minimum is 1"),
        ("--port 65536", "--port is 65536, the maximum is 65535"),
        ("--gpu-memory 8G", "--gpu-memory is '8G', expected a number of bytes, or a size such as 500MB or 1.5GiB"),
        ("--tls-key k", "tls_certificate and tls_key must be set together: set both or neither"),
        ("--config nowhere.toml", "nowhere.toml: No such file or directory"),
        ("--max-step 9", "unrecognized arguments: --max-step; did you mean '--max-steps'?"),
    ],
)
def test_invalid_flags_are_errors_of_one_line(words: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _complaint(capsys, "--models", "m", *words.split()) == problem


def test_models_setting_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    line = _complaint(capsys, "--port", "0", "--print-config")
    assert line == "models is not set: give --models DIR, the variable IMG2IMG_MODELS or the key 'models' in a file"


def test_config_flag_overrides_the_config_variable(tmp_path: Path) -> None:
    one, other = tmp_path / "one.toml", tmp_path / "other.toml"
    one.write_text("port = 1", encoding="utf-8")
    other.write_text("port = 2", encoding="utf-8")
    assert _parse(IMG2IMG_CONFIG=str(one)).port == 1
    assert _parse("--config", str(other), IMG2IMG_CONFIG=str(one)).port == 2


def test_client_command_variables_are_not_server_settings() -> None:
    names = ("TARGET", "TOKEN", "CA", "CLIENT_CERTIFICATE", "CLIENT_KEY")
    assert _parse(**{f"IMG2IMG_{name}": "x" for name in names}) == ServerConfig(Path("m"))
    with pytest.raises(ValueError, match="unknown setting IMG2IMG_TOKENZ; did you mean IMG2IMG_TOKEN\\?"):
        _parse(IMG2IMG_TOKENZ="x")


def test_print_config_loads_nothing_and_its_output_is_valid_input(tmp_path: Path) -> None:
    """In a fresh process, with a missing models folder."""
    (tmp_path / "server.toml").write_text('grace = "2m"\n[limits]\nmax_active = 3\n[tls]\n', encoding="utf-8")
    words = ["serve", "--models", "nowhere", "--config", "server.toml", "--print-config"]
    code = (
        "import sys; from img2img_cli.__main__ import main; status = main(sys.argv[1:]);"
        "print(sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr); sys.exit(status)"
    )
    environment = {"IMG2IMG_PORT": "7", "PATH": ""}
    printed = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=60,
        check=True,
    )
    lines = printed.stdout.splitlines()
    for line in (
        f'models = "{tmp_path}/nowhere"  # flag',
        "port = 7  # IMG2IMG_PORT",
        "grace = 120.0  # server.toml",
        "max_active = 3  # server.toml",
        "watchdog = 300.0  # default",
        "# gpu_memory = (not set)",
    ):
        assert line in lines
    assert not any(f"'{name}'" in printed.stderr for name in HEAVY)

    again = tmp_path / "elsewhere" / "again.toml"
    again.parent.mkdir()
    again.write_text(printed.stdout, encoding="utf-8")
    parser = argparse.ArgumentParser()
    configure(parser)
    config = configured(parser.parse_args(["--config", str(again)]), {}).config
    assert config == ServerConfig(tmp_path / "nowhere", port=7, grace=120.0, limits=QueueLimits(max_active=3))
