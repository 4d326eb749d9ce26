"""`img2img export`: every flag reaches the exporter, what cannot work is refused at once, and each form of output is whole."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from img2img_cli.__main__ import main
from img2img_export import build
from img2img_export.cli.export import parse_lora
from img2img_export.errors import ExportError
from img2img_export.options import ExportOptions, LoraFile
from img2img_export.progress import Progress
from img2img_server.bundle.manifest import ComponentParity, ImageParity, Manifest, Source, Verification


class Exporter:
    """Replaces `export_model`: records its arguments, reports progress, and returns an outcome or raises an error."""

    def __init__(self, path: Path) -> None:
        self.asked: list[ExportOptions] = []
        self.error: Exception | None = None
        verification = Verification(
            True, (ComponentParity("unet", "batch 1", 1e-6, 1e-7, True),), (ImageParity("a lake", 1, float("inf"), True),)
        )
        self.outcome = build.Outcome(
            path=path,
            manifest=Manifest(Source(), "P", "stable-diffusion", "onnx", (), {}, {}, verification, precision="fp16"),
            up_to_date=False,
        )

    def __call__(self, options: ExportOptions, progress: Progress) -> build.Outcome:
        self.asked.append(options)
        progress.stage("loading")
        with progress.task("hashing", 4) as advance:
            advance(4)
        if self.error is not None:
            raise self.error
        return self.outcome


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Exporter:
    exporter = Exporter(tmp_path)
    (tmp_path / "weights").write_bytes(b"12345")
    monkeypatch.setattr(build, "export_model", exporter)
    return exporter


def export(*words: str) -> int:
    return main(["export", "model", "--output", "out", *words])


def test_flag_defaults_match_the_options(exporter: Exporter) -> None:
    assert export() == 0
    assert exporter.asked == [ExportOptions(source="model", output=Path("out"))]


def test_every_flag_reaches_the_exporter(exporter: Exporter) -> None:
    flags = (
        "--variant fp16 --revision main --allow-pattern unet/* --allow-pattern vae/* --ignore-pattern *.bin --config some/repo"
    )
    more = "--reference ./sd15 --lora a.safetensors --lora b:c.safetensors:0.5 --scheduler lcm --precision int8 --backend hybrid"
    last = "--force --allow-unverified --weight-format int4 --group-size 64"
    assert export(*flags.split(), *more.split(), *last.split()) == 0
    assert exporter.asked == [
        ExportOptions(
            source="model",
            output=Path("out"),
            variant="fp16",
            revision="main",
            allow_patterns=("unet/*", "vae/*"),
            ignore_patterns=("*.bin",),
            config="some/repo",
            reference="./sd15",
            loras=(LoraFile(Path("a.safetensors")), LoraFile(Path("b:c.safetensors"), 0.5)),
            scheduler="LCM",
            precision="int8",
            backend="hybrid",
            force=True,
            allow_unverified=True,
            weight_format="int4",
            group_size=64,
        )
    ]


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("style.safetensors", "style.safetensors", 1.0),
        ("style.safetensors:0.7", "style.safetensors", 0.7),
        ("style.safetensors:-1", "style.safetensors", -1.0),
        ("dir:2/style.safetensors", "dir:2/style.safetensors", 1.0),
        ("a:b:1e-1", "a:b", 0.1),
        ("0.5", "0.5", 1.0),
        ("style.safetensors:", "style.safetensors:", 1.0),
    ],
)
def test_lora_scale_is_the_number_after_the_last_colon(text: str, path: str, scale: float) -> None:
    assert parse_lora(text) == LoraFile(Path(path), scale)


@pytest.mark.parametrize(
    "words",
    [
        ("--lora", "a:nan"),
        ("--lora", "a:inf"),
        ("--scheduler", "nope"),
        ("--precision", "fp8"),
        ("--backend", "tensorrt"),
        ("--variant",),
        ("--nope",),
    ],
)
def test_impossible_options_are_refused_before_any_work(
    words: tuple[str, ...], exporter: Exporter, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        export(*words)
    assert caught.value.code == 2
    assert words[-1].rpartition(":")[2] in capsys.readouterr().err
    assert exporter.asked == []


def test_plain_output_has_stages_and_a_summary(exporter: Exporter, capsys: pytest.CaptureFixture[str]) -> None:
    assert export() == 0
    out, err = capsys.readouterr()
    stage, task, summary = out.splitlines()
    assert stage.endswith(" s  loading")
    assert "hashing: 4 B" in task
    assert summary == exporter.outcome.summary()
    assert err == ""


def test_json_output_is_objects_only_and_ends_with_the_result(exporter: Exporter, capsys: pytest.CaptureFixture[str]) -> None:
    assert export("--json") == 0
    events: list[dict[str, Any]] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["stage", "progress", "result"]
    result = events[-1]
    assert result["path"] == str(exporter.outcome.path)
    assert (result["family"], result["backend"], result["precision"]) == ("stable-diffusion", "onnx", "fp16")
    assert (result["bytes"], result["up_to_date"], result["verification"]["passed"]) == (5, False, True)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ExportError("the disk is not round"), "the disk is not round"),
        (OSError("a library's own words"), "a library's own words"),
        (OSError(28, "No space left on device"), "out: No space left on device"),
        (OSError(13, "Permission denied", "/x/unet"), "/x/unet: Permission denied"),
    ],
)
def test_a_failure_is_one_line_and_with_json_the_last_event(
    error: Exception, message: str, exporter: Exporter, capsys: pytest.CaptureFixture[str]
) -> None:
    exporter.error = error
    assert export() == 1
    assert capsys.readouterr().err == f"img2img export: {message}\n"
    assert export("--json") == 1
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1]) == {"event": "error", "message": message}
    assert err == f"img2img export: {message}\n"


def test_the_help_has_an_example_of_each_kind_of_source(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    examples = capsys.readouterr().out.partition("examples:")[2]
    for words in (
        "img2img export stabilityai/stable-diffusion-xl-base-1.0 --variant fp16",
        "img2img export ./my-model --output models/my-model\n",
        "--dry-run",
        "img2img export dreams.safetensors --config",
        "img2img export ./sd15-onnx --reference",
        "--lora lcm.safetensors --scheduler lcm",
    ):
        assert words in examples


def test_the_help_loads_nothing_heavy() -> None:
    code = """
import sys
for name in ("torch", "diffusers", "transformers", "optimum", "onnx", "onnxruntime", "numpy", "PIL", "rich", "huggingface_hub"):
    sys.modules[name] = None
from img2img_cli.__main__ import main
main(["export", "--scheduler", "lcm", "--help"])
"""
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
