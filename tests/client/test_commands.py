"""`img2img transform`, and the common behaviour of all commands: their requests, output, files and exit status."""

import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_image_service import PATIENCE, FakeServer, events, image_bytes
from fake_statuses import error_info, queue_full, rich_status, wrong_field
from google.rpc import code_pb2  # type: ignore[import-untyped, unused-ignore]
from img2img.v1 import image_to_image_pb2 as messages
from img2img_cli.__main__ import main
from PIL import Image


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(image_bytes("blue"))
    return path


def transform(server: FakeServer, source: object, output: object, *more: str) -> int:
    """Runs the command; returns its exit status."""
    return main(["transform", str(source), "--output", str(output), "--server", server.target, *more])


def test_an_image_is_transformed(server: FakeServer, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert transform(server, source, tmp_path / "out.png") == 0
    assert (tmp_path / "out.png").read_bytes() == image_bytes()
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"{tmp_path / 'out.png'}  4 x 2, seed 7",
        "demo on onnx:cpu",
        "queue 1 ms, encode 2 ms, denoise 3 ms, decode 4 ms, total 11 ms",
    ]
    assert err.splitlines() == [
        "queued, 3 ahead, done in about 2 s",
        "running on onnx:cpu, seed 7",
        "step 1 of 2",
        "step 2 of 2",
    ]


def test_every_flag_reaches_the_server(server: FakeServer, source: Path, tmp_path: Path) -> None:
    flags = (
        "--prompt=winter --negative-prompt=summer --strength=0.5 --steps=30 --guidance-scale=4.5 --seed=-1 --image-count=3 "
        "--width=640 --height=480 --quality=75 --model=folder --repo-id=owner/name --variant=fp16 --revision=main --timeout=50 "
        "--scheduler=DDIM --preview-every=4"
    )
    server.service.script = events(7, 8, 9)
    assert transform(server, source, tmp_path / "out.jpg", *flags.split()) == 0
    assert server.service.requests == [
        messages.TransformRequest(
            model=messages.ModelReference(repo_id="owner/name", path="folder", variant="fp16", revision="main"),
            prompt="winter",
            negative_prompt="summer",
            image=messages.ImageSource(data=source.read_bytes()),
            strength=0.5,
            num_inference_steps=30,
            guidance_scale=4.5,
            seed=-1,
            image_count=3,
            output=messages.OutputOptions(format=messages.OUTPUT_FORMAT_JPEG, quality=75),
            width=640,
            height=480,
            scheduler="DDIM",
            preview_interval=4,
        )
    ]
    assert server.service.seconds_left[0] is not None
    assert server.service.seconds_left[0] < 51


def test_omitted_flags_stay_unset(server: FakeServer, source: Path, tmp_path: Path) -> None:
    assert transform(server, source, tmp_path / "out", "--format=webp", "--num-inference-steps=9") == 0
    set_fields = {field.name for field, _ in server.service.requests[0].ListFields()}
    assert set_fields == {"image", "output", "num_inference_steps"}
    assert server.service.requests[0].output == messages.OutputOptions(format=messages.OUTPUT_FORMAT_WEBP)


def test_several_images_are_numbered(
    server: FakeServer, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.service.script = events(7, 8)
    assert transform(server, source, tmp_path / "out.png", "--image-count=2", "--json") == 0
    outcome = json.loads(capsys.readouterr().out)
    assert [(image["path"], image["seed"]) for image in outcome["images"]] == [
        (str(tmp_path / "out-1.png"), 7),
        (str(tmp_path / "out-2.png"), 8),
    ]
    assert outcome["request_id"] == "made"
    assert (outcome["engine"], outcome["model"]["id"], outcome["timings"]["total_ms"]) == ("onnx:cpu", "demo", 11)
    assert {path.name for path in tmp_path.iterdir()} == {"photo.png", "out-1.png", "out-2.png"}


def test_the_flags_of_a_mask(server: FakeServer, source: Path, tmp_path: Path) -> None:
    mask = tmp_path / "mask.png"
    Image.new("L", (4, 4), 255).save(mask)
    out = tmp_path / "out.png"
    transform(server, source, out, f"--mask={mask}", "--mask-blur=2.5", "--mask-invert", "--no-mask-paste")
    asked = server.service.requests[0]
    assert asked.mask.data == mask.read_bytes()
    assert (asked.mask_blur, asked.mask_invert, asked.mask_paste) == (2.5, True, False)
    transform(server, source, out)
    assert not any(server.service.requests[1].HasField(name) for name in ("mask", "mask_blur", "mask_invert", "mask_paste"))


@pytest.mark.parametrize("flag", ["--fit=native", "--fit=1024"])
def test_fit_is_a_rule_or_a_longest_side(server: FakeServer, source: Path, tmp_path: Path, flag: str) -> None:
    assert transform(server, source, tmp_path / "out.png", flag) == 0
    fit = server.service.requests[0].fit
    assert fit == (messages.Fit(native_area=messages.NativeArea()) if "native" in flag else messages.Fit(longest_side=1024))


def test_a_fit_of_another_kind_is_a_wrong_flag(
    server: FakeServer, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        transform(server, source, tmp_path / "out.png", "--fit=wide")
    assert ended.value.code == 2
    assert "--fit: must be native or a number of pixels, not 'wide'" in capsys.readouterr().err


def test_warnings_go_to_standard_error(
    server: FakeServer, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    warning = {"field": "prompt", "description": "it was too long", "code": "PROMPT_TRUNCATED"}
    server.service.script[-1].completed.warnings.add(**warning)
    assert transform(server, source, tmp_path / "out.png", "--json") == 0
    told = capsys.readouterr()
    assert "img2img transform: warning: prompt: it was too long\n" in told.err
    assert json.loads(told.out)["warnings"] == [warning]
    assert transform(server, source, tmp_path / "out.png", "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_previews_are_written_next_to_the_image(server: FakeServer, source: Path, tmp_path: Path) -> None:
    server.service.script = events(steps=10, preview_interval=3)
    assert transform(server, source, tmp_path / "out.png", "--preview-every=3", "--quiet") == 0
    previews = sorted(path.name for path in tmp_path.glob("out-*"))
    assert previews == ["out-step-03.jpg", "out-step-06.jpg", "out-step-09.jpg"]
    with Image.open(tmp_path / "out-step-06.jpg") as preview:
        assert preview.format == "JPEG"


def test_from_standard_input_to_standard_output(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(image_bytes("green"))))
    assert transform(server, "-", "-") == 0
    out, err = capsysbinary.readouterr()
    assert out == image_bytes()
    assert b"standard output  4 x 2, seed 7" in err
    assert server.service.requests[0].image.data == image_bytes("green")
    assert not server.service.requests[0].HasField("output")


def test_quiet_prints_nothing(server: FakeServer, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert transform(server, source, tmp_path / "out.png", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("output", "flags", "status", "complaint"),
    [
        ("out.gif", (), 2, "the name must end in .png"),
        ("out", (), 2, "or --format must be given"),
        ("out.png", ("--format=jpeg",), 2, "the suffix means png, but --format is jpeg"),
        ("-", ("--image-count=2",), 2, "writes a single image"),
        ("-", ("--json",), 2, "both write to standard output"),
        ("-", ("--preview-every=2",), 2, "--preview-every writes files beside OUT"),
        ("out.png", ("--retries=-1",), 2, "--retries must be at least 0"),
        ("missing/out.png", (), 1, "missing/out.png: No such file or directory"),
        ("folder.png", (), 1, "folder.png: Is a directory"),
        ("out.png", ("--width=99999999999",), 2, "99999999999"),
    ],
)
def test_invalid_output_is_refused_before_the_call(
    server: FakeServer,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    output: str,
    flags: tuple[str, ...],
    status: int,
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    assert transform(server, source, output, *flags) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("img2img transform: ")
    assert complaint in line
    assert server.service.requests == []
    assert {path.name for path in tmp_path.iterdir()} == {"photo.png", "folder.png"}


def test_missing_source_file_is_one_line(server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert transform(server, tmp_path / "missing.png", tmp_path / "out.png") == 1
    assert capsys.readouterr().err == f"img2img transform: {tmp_path / 'missing.png'}: No such file or directory\n"


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        (wrong_field("strength", "must be at most 1"), "strength: must be at most 1"),
        (queue_full(2.5), "the queue is full (retry after 2.5 s)"),
        (rich_status(code_pb2.INTERNAL, "the model\nfailed", error_info("MODEL_FAILED")), "the model failed"),
        (rich_status(code_pb2.INTERNAL, "it failed", error_info("INTERNAL", request_id="abc")), "it failed (request abc)"),
        (rich_status(code_pb2.UNAVAILABLE, "shutting down", error_info("SHUTTING_DOWN")), "shutting down"),
    ],
)
def test_errors_are_one_line(
    server: FakeServer, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], failure: Any, line: str
) -> None:
    server.service.failure = failure
    (tmp_path / "out.png").write_bytes(b"what was there")
    assert transform(server, source, tmp_path / "out.png", "--quiet", "--retries=0") == 1
    assert capsys.readouterr() == ("", f"img2img transform: {line}\n")
    assert (tmp_path / "out.png").read_bytes() == b"what was there"


def test_unreachable_server_is_reported_clearly(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["transform", str(source), "--output", str(tmp_path / "out.png")], ["models"]):
        assert main([*command, "--server", "127.0.0.1:1", "--retries=0"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"img2img {command[0]}: no response from 127.0.0.1:1: ")
    assert not (tmp_path / "out.png").exists()


def test_interrupting_cancels_on_the_server(server: FakeServer, source: Path, tmp_path: Path) -> None:
    server.service.hold = True
    command = ["transform", str(source), "--output", str(tmp_path / "out.png"), "--server", server.target]
    # Python ignores Ctrl-C where its parent did, as a shell's background jobs do.
    heed = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heed}; from img2img_cli.__main__ import main; sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", code, *command], stderr=subprocess.PIPE, text=True)
    try:
        assert server.service.holding.wait(PATIENCE)
        process.send_signal(signal.SIGINT)
        assert server.service.released.wait(PATIENCE)
        _, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not (tmp_path / "out.png").exists()


def test_busy_server_is_retried_with_a_message(
    server: FakeServer, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.service.failures, server.service.fail_before = [queue_full(0.01)], 0
    assert transform(server, source, tmp_path / "out.png") == 0
    first, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith("img2img transform: the queue is full (retry after 0.01 s); retrying in 0.")
    server.service.failures = [queue_full(0.01)]
    assert transform(server, source, tmp_path / "out.png", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_source_uris_are_passed_to_the_server(server: FakeServer, tmp_path: Path) -> None:
    for address in ("asset:1f", "https://example.org/a.png"):
        assert transform(server, address, tmp_path / "out.png", "--quiet") == 0
    assert [request.image.uri for request in server.service.requests] == ["asset:1f", "https://example.org/a.png"]


def test_an_image_may_stay_on_the_server(server: FakeServer, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.service.script[-1].completed.images[0].asset_id = "kept"
    command = ["transform", str(source), "--as-asset", "--format=webp", "--target", server.target]
    assert main([*command, "--quiet"]) == 0
    assert capsys.readouterr() == ("asset:kept\n", "")
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("asset:kept  4 x 2, seed 7\n")
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"][0]["asset"] == "asset:kept"
    assert main([*command, "--preview-every=2"]) == 2
    (request, *_) = server.service.requests
    assert (request.output.as_asset, request.output.format) == (True, messages.OUTPUT_FORMAT_WEBP)
    with pytest.raises(SystemExit):
        main([*command, "--output=out.png"])


@pytest.mark.parametrize("command", ["transform", "models", "assets"])
def test_help_imports_nothing_heavy(command: str) -> None:
    heavy = ("grpc", "google.protobuf", "PIL", "rich", "numpy", "torch")
    code = (
        "import sys, atexit; from img2img_cli.__main__ import main\n"
        f"atexit.register(lambda: print('imported', [name for name in {heavy} if name in sys.modules], file=sys.stderr))\n"
        f"main(['{command}', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "imported []\n")
    assert command == "assets" or "--target" in done.stdout


def test_a_control_has_settings_after_its_image(server: FakeServer, source: Path, tmp_path: Path) -> None:
    """The mode of a union is an integer. A file's name may contain commas."""
    edges = tmp_path / "a,b.png"
    edges.write_bytes(image_bytes("red"))
    control = f"union={edges},scale=0.5,end=0.75,control_mode=3"
    assert transform(server, source, tmp_path / "out.png", "--control", control) == 0
    (sent,) = server.service.requests[-1].controls
    assert (sent.model.path, sent.scale, sent.end, sent.control_mode) == ("union", 0.5, 0.75, 3)
    assert not sent.HasField("start")


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("control_mode=0.5", "control_mode must be an integer, not '0.5'"),
        ("scale=much", "scale must be a number, not 'much'"),
        ("scale=1,mode=3", "unknown setting 'mode': use scale, start, end, control_mode"),
    ],
)
def test_a_wrong_setting_of_a_control_is_named(
    setting: str, problem: str, server: FakeServer, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        transform(server, source, tmp_path / "out.png", "--control", f"union=edges.png,{setting}")
    assert problem in capsys.readouterr().err
