"""`scripts/gpu_check`: what of it runs without a GPU, on tiny models; and that a section that fails takes nothing with it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import pytest
from gpu_check import Running, Section, main, print_table
from gpu_check_parts import sections
from gpu_check_parts.settings import FLOORS, Line, Settings
from img2img_server.bundle import read_manifest


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A tiny model and its bundle, on the CPU."""
    settings = Settings(tmp_path_factory.mktemp("gpu_check"), "cpu", tiny=True, compile=False, seconds=0.0, threads=1)
    assert [line.unit for line in sections.build(settings, "sd15")] == ["s", "s"]
    return settings


def _names(lines: list[Line]) -> list[str]:
    return [line.name for line in lines]


def test_a_bundle_made_on_the_spot_says_that_it_was_not_verified(built: Settings) -> None:
    manifest = read_manifest(built.bundle("sd15"))
    assert not manifest.verification.passed
    assert {component.name for component in manifest.components} == {"text_encoder", "unet", "vae_encoder", "vae_decoder"}


def test_a_unet_is_timed_beside_other_sessions_and_pytorch(built: Settings) -> None:
    lines = sections.unet(built, "sd15")
    assert _names(lines) == ["ours", "session", "PyTorch"]
    assert all(line.unit == "ms" and (line.value or 0) > 0 for line in lines)


def test_the_two_halves_of_a_vae_are_timed(built: Settings) -> None:
    assert _names(sections.vae(built, "sd15")) == ["ours", "PyTorch"] * 2


def test_a_picture_is_timed_and_is_pytorchs(built: Settings) -> None:
    lines = {line.name: line for line in sections.picture(built)}
    assert lines["ours, PSNR against fp32"].passed
    assert lines["PyTorch, PSNR against fp32"].value == 999.0
    assert lines["ours"].aim == "", "what a GPU is to reach is not asked of a CPU"


def test_what_needs_a_gpu_says_so(built: Settings) -> None:
    lines = [*sections.memory(built), *sections.tensorrt(built), *sections.about(built)]
    assert not any(line.passed is False for line in lines)
    assert any(line.note.startswith("not tried") for line in lines)


def test_sessions_to_compare_differ_in_what_they_are_named_for(tmp_path: Path) -> None:
    settings = Settings(tmp_path, "cuda")
    for graph in (settings.bundle("sd15") / "unet" / "model.onnx", settings.bundle("sd15") / "unet" / "cuda" / "model.onnx"):
        graph.parent.mkdir(parents=True, exist_ok=True)
        graph.touch()
    found = sections._graphs(settings, "sd15")
    assert found["fused"][1] == {"cudnn_conv_algo_search": "HEURISTIC"}
    assert found["fused, CUDA graph"][1]["enable_cuda_graph"] == "1"
    assert int(found["fused, cuDNN attention"][1]["sdpa_kernel"]) & 8
    assert not int(found["fused, flash attention"][1]["sdpa_kernel"]) & 8
    assert found["plain, NHWC"][1]["prefer_nhwc"] == "1"
    assert found["plain"][0].parent.name == "unet"
    assert found["fused"][0].parent.name == "cuda"


def _running(tmp_path: Path, code: str, limit: float) -> Running:
    log, found = tmp_path / "a.log", tmp_path / "a.json"
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=file, stderr=file, start_new_session=True)
    return Running(Section("a", limit), process, found, log, time.monotonic())


def test_a_section_that_fails_is_a_line_with_its_last_words(tmp_path: Path) -> None:
    (line,) = _running(tmp_path, "raise SystemExit('no kernel image')", 60).wait(60)
    assert (line.passed, line.note) == (False, "ended with status 1: no kernel image")


def test_a_section_that_hangs_is_stopped(tmp_path: Path) -> None:
    running = _running(tmp_path, "import time; time.sleep(600)", 0.1)
    (line,) = running.wait(60)
    assert line.passed is False
    assert line.note.startswith("stopped after")
    assert running.process.returncode is not None


def test_what_a_failed_build_leaves_out_is_told_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / "about.json"

    def start(section: Section, settings: Settings) -> Running:
        lines = json.dumps([{"section": "machine", "name": "cpu", "note": "a fake"}])
        code = "raise SystemExit(3)" if section.name.startswith("build") else f"open({str(found)!r}, 'w').write({lines!r})"
        running = _running(tmp_path, code, 60)
        running.section, running.found = section, found
        return running

    monkeypatch.setattr(gpu_check, "_start", start)
    words = ["--tiny", "--provider", "cpu", "--no-compile", "--only", "about,vae", "--out", str(tmp_path / "told.json")]
    assert main(words) == 1
    told = {line["section"]: line for line in json.loads((tmp_path / "told.json").read_text())}
    assert told["vae"]["note"] == "build-sd15 failed"
    assert told["machine"]["note"] == "a fake"
    assert "0 of 2 aims reached" in capsys.readouterr().out


def test_the_command_runs_a_section_in_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tiny", "--provider", "cpu", "--no-compile", "--only", "about", "--seconds", "0", "--folder", str(tmp_path)]
    assert main(words) == 0
    assert "TFLOP/s" in capsys.readouterr().out


def test_aims_are_told_with_what_was_reached(capsys: pytest.CaptureFixture[str]) -> None:
    floor = Settings(Path(), "cuda").floor("unet-sd15")
    assert floor == FLOORS["unet-sd15"]
    good = Line("UNet", "ours", 4.0, "ms").limited(floor, 2.5)
    bad = Line("UNet", "ours", 6.0, "ms").limited(floor, 2.5)
    assert (good.passed, bad.passed, Line("UNet", "ours", 6.0).limited(None, 2.0).passed) == (True, False, None)
    print_table([good, bad])
    shown = capsys.readouterr().out
    assert "1 of 2 aims reached" in shown
    assert "<= 5.07 ms (1.97 x floor)" in shown


def test_an_unknown_section_is_an_error() -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--only", "abacus"])
    assert exit_.value.code == 2
