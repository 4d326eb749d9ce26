"""`scripts/gpu_check` and `scripts/gpu_check_pack` without a GPU: tiny models on the CPU. tests/cuda has them on CUDA."""

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import torch
from gpu_check import __main__ as command
from gpu_check import models, pack, weightless
from gpu_check.preflight import preflight
from gpu_check.random_weights import random_values
from gpu_check.results import Line, append, print_table, read
from gpu_check.sections import SECTIONS
from gpu_check.settings import AIMS, READY_NAME, Settings
from gpu_check.works import Opened, difference
from img2img_export.verify.parity import open_fused, open_graph
from img2img_server.bundle.manifest import read_manifest
from img2img_server.runtime.onnx.runners import HostRunner

ROOT = Path(__file__).parents[1]
MAKES = ("tiny-sd15", "tiny-sdxl")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Tiny models with random weights in fp32, and their graphs without weights."""
    folder = tmp_path_factory.mktemp("gpu_check")
    for name in MAKES:
        weightless.make(name, folder / "graphs" / name, "fp32")
        weightless.fill(folder / "graphs" / name, folder / name)
    out = folder / "results.jsonl"
    return Settings(folder, folder / "graphs", out, "cpu", tiny=True, compile=False, seconds=0.0, threads=1)


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graphs of a tiny model in fp16, plain and fused, without weights."""
    folder = tmp_path_factory.mktemp("gpu_check_fp16")
    weightless.make("tiny-sd15", folder / "graphs" / "tiny-sd15", "fp16")
    return folder / "graphs"


def _names(lines: Iterator[Line]) -> list[str]:
    found = list(lines)
    assert not [line for line in found if line.passed is False]
    return [line.name for line in found]


@pytest.mark.nightly
def test_graphs_without_weights_are_small_and_have_no_data(fused: Path) -> None:
    files = [path for path in fused.rglob("*") if path.is_file()]
    assert not [path for path in files if path.name.endswith("_data") or "safetensors" in path.name]
    assert sum(path.stat().st_size for path in files) < 3_000_000
    parameters = sum(value.numel() for value in models.unet("tiny-sd15").parameters())
    assert parameters * 2 > 3_000_000


def test_model_filled_with_random_weights_is_marked_unverified(settings: Settings) -> None:
    manifest = read_manifest(settings.bundle("sd15"))
    assert not manifest.verification.passed
    assert {component.name for component in manifest.components} == {"text_encoder", "unet", "vae_encoder", "vae_decoder"}
    assert all(component.precision == "fp32" and component.bytes > 0 for component in manifest.components)


@pytest.mark.nightly
def test_random_weights_are_deterministic(fused: Path, tmp_path: Path) -> None:
    for name in ("one", "other"):
        weightless.fill(fused / "tiny-sd15", tmp_path / name)
    one, other = ((tmp_path / name / "unet" / "model.onnx_data").read_bytes() for name in ("one", "other"))
    assert one == other
    manifest = read_manifest(tmp_path / "one")
    assert {component.fused for component in manifest.components} == {
        *("", "unet/cuda/model.onnx", "vae_encoder/cuda/model.onnx", "vae_decoder/cuda/model.onnx")
    }
    graph = onnx.load(str(tmp_path / "one" / "unet" / "model.onnx"))
    assert {item.data_type for item in graph.graph.initializer} >= {onnx.TensorProto.FLOAT16}


@pytest.mark.nightly
def test_only_selected_graphs_get_weights(fused: Path, tmp_path: Path) -> None:
    weightless.fill(fused / "tiny-sd15", tmp_path / "some", lambda graph: graph == "unet/cuda")
    assert [path.parent.name for path in (tmp_path / "some").rglob("model.onnx")] == ["cuda"]


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("part", "feed"),
    [
        ("unet", models.unet_feed({"in_channels": 4, "cross_attention_dim": 64}, 2, 64)),
        ("vae_decoder", {"latent_sample": torch.randn(1, 4, 8, 8)}),
        ("vae_encoder", {"sample": torch.randn(1, 3, 64, 64)}),
    ],
)
def test_the_fused_graph_has_the_weights_of_the_plain_one(
    part: str, feed: dict[str, torch.Tensor], fused: Path, tmp_path: Path
) -> None:
    weightless.fill(fused / "tiny-sd15", tmp_path / "filled", lambda graph: graph.startswith(part))
    graph = tmp_path / "filled" / part
    plain, fast = (
        Opened(HostRunner(session)).work(feed).outputs[0]
        for session in (open_graph(graph / "model.onnx"), open_fused(graph / "cuda" / "model.onnx"))
    )
    assert difference(fast, plain) < 0.01


def test_random_weights_preserve_the_scale_of_activations() -> None:
    norm, bias = random_values("a.norm.weight", (640,)), random_values("a.norm.bias", (640,))
    assert abs(float(norm.mean()) - 1) < 0.05
    assert float(bias.abs().max()) < 0.2
    matrix = random_values("a.to_q.weight", (1280, 640))
    assert 0.5 < float((torch.randn(64, 640) @ matrix.T).std()) < 0.7
    assert not torch.equal(matrix, random_values("b.to_q.weight", (1280, 640)))
    assert torch.equal(matrix, random_values("a.to_q.weight", (1280, 640)))
    assert random_values("large.weight", (4096, 4096)).isfinite().all(), "larger than what is drawn"


def test_preflight_compares_recorded_calls_with_eager_ones(settings: Settings) -> None:
    names = _names(preflight(settings))
    assert names[:1] == ["cpu"]
    assert names[-4:] == ["UNet, 2 and 4 rows", "UNet, recorded", "recorded against eager", "all of it"]


@pytest.mark.parametrize(
    ("section", "names"),
    [
        pytest.param(
            "switch", ["2 rows, unchanged", "2 rows after 4", "4 rows, unchanged", "4 rows after 2"], marks=pytest.mark.nightly
        ),
        ("replay", ["1 rows", "2 rows", "4 rows", "8 rows", "16 rows", "2 rows after 4", "4 rows after 2"]),
        ("unet-sd15", ["ours", "not recorded", "PyTorch", "ours against PyTorch in fp32"]),
        pytest.param("unet-sdxl", ["ours", "not recorded", "PyTorch", "ours against PyTorch in fp32"], marks=pytest.mark.nightly),
        pytest.param("vae", ["ours", "PyTorch", "ours against PyTorch"] * 2, marks=pytest.mark.nightly),
        pytest.param("image", ["ours", "PyTorch"], marks=pytest.mark.nightly),
        pytest.param("cold", ["process start to first image, sd15"], marks=pytest.mark.nightly),
        pytest.param("memory", ["out of memory"], marks=pytest.mark.nightly),
    ],
)
def test_every_section_runs_on_a_cpu_and_yields_its_lines(
    section: str, names: list[str], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", ":".join(str(ROOT / name) for name in ("benchmarks", "scripts")))
    assert _names(SECTIONS[section](settings)) == names


@pytest.mark.nightly
def test_engine_step_time_is_split_into_model_call_and_overhead(settings: Settings) -> None:
    lines = list(SECTIONS["host"](settings))
    assert [line.name for line in lines][:3] == [
        "warm-up's recordings",
        "1 requests, a step",
        "1 requests, outside the UNet's call",
    ]
    assert all((line.value or 0) > 0 for line in lines if line.name.endswith("a step"))


def test_every_section_of_the_command_exists() -> None:
    assert {section.name for section in command.SECTIONS[1:]} == set(SECTIONS) - {"first-image"}


def test_results_are_appended_and_a_partial_line_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert read(path) == []
    append(path, [Line("a", "one", 1.0, "ms")])
    append(path, [Line("b", "two", passed=False, note="no")])
    with path.open("a") as file:
        file.write('{"section": "c", "name": "cut o')
    assert [line.name for line in read(path)] == ["one", "two"]


def test_table_shows_targets_and_results(capsys: pytest.CaptureFixture[str]) -> None:
    on_gpu = Settings(Path(), Path(), Path())
    assert on_gpu.aim("unet-sd15") == AIMS["unet-sd15"] == 5.0
    good = Line("UNet", "ours", 4.0, "ms").at_most(on_gpu.aim("unet-sd15"))
    bad = Line("UNet", "torch.compile over ours", 0.9, "x").at_least(1.0)
    assert (good.passed, bad.passed, Line("UNet", "ours", 6.0).at_most(None).passed) == (True, False, None)
    print_table([good, bad])
    shown = capsys.readouterr().out
    assert "1 of 2 targets met" in shown
    assert "<= 5 ms" in shown


def _run(tmp_path: Path, code: str) -> command.Run:
    log = tmp_path / "a.log"
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=file, stderr=file, start_new_session=True)
    return command.Run(process, log)


def test_failed_section_is_a_line_with_its_last_output(tmp_path: Path) -> None:
    assert _run(tmp_path, "raise SystemExit('no kernel image')").wait(60) == "no kernel image"
    assert _run(tmp_path, "import os; os.abort()").wait(60) == "ended with status -6"
    assert (
        _run(tmp_path, "import os; print('in a kernel', flush=True); os.abort()").wait(60) == "ended with status -6: in a kernel"
    )
    assert _run(tmp_path, "raise SystemExit(1)").wait(60) == "ended with status 1"


def test_a_section_that_hangs_is_stopped(tmp_path: Path) -> None:
    run = _run(tmp_path, "import time; time.sleep(600)")
    assert run.wait(0.1).startswith("stopped after")
    assert run.process.returncode is not None


class _FakeRuns:
    """Runs of this command that end at once; those of `failing` fail."""

    def __init__(self, failing: set[str]) -> None:
        self.failing = failing
        self.started: list[str] = []

    def __call__(self, settings: Settings, environment: dict[str, str]) -> "_FakeRuns":
        self._settings = settings
        return self

    def start(self, name: str) -> None:
        self.started.append(name)
        step, _, model = name.partition("-")
        if step == "make" and name not in self.failing:
            (self._settings.graphs / model).mkdir(parents=True)
            (self._settings.graphs / model / READY_NAME).write_text(self._settings.precision)
        if step not in ("make", "fill"):
            append(self._settings.out, [Line(name, "first")])

    def wait(self, name: str, limit: float) -> str:
        return f"{name} is broken" if name in self.failing else ""

    def stop_all(self) -> None:
        pass


def _checked(
    tmp_path: Path, failing: set[str], monkeypatch: pytest.MonkeyPatch, *words: str
) -> tuple[list[str], list[Line], int]:
    runs = _FakeRuns(failing)
    monkeypatch.setattr(command, "Runs", runs)
    out = tmp_path / "results.jsonl"
    status = command.main(["--tiny", "--out", str(out), "--folder", str(tmp_path / "folder"), *words])
    return runs.started, read(out), status


def test_failed_preflight_skips_all_other_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, lines, status = _checked(tmp_path, {"preflight"}, monkeypatch)
    assert [name for name in started if not name.startswith(("make", "fill"))] == ["preflight"]
    assert [(line.section, line.note) for line in lines if line.passed is False] == [("preflight", "preflight is broken")]
    assert status == 1


def test_model_without_graphs_skips_only_its_own_sections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--only", "vae,unet-sdxl")
    started, lines, status = _checked(tmp_path, {"make-tiny-sdxl"}, monkeypatch, *words)
    assert "vae" in started
    assert "unet-sdxl" not in started
    assert "tiny-sdxl has no graphs: make-tiny-sdxl is broken" in [line.note for line in lines]
    assert status == 1
    assert "0 of 1 targets met" in capsys.readouterr().out


def test_single_section_prepares_only_its_own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, _, status = _checked(tmp_path, set(), monkeypatch, "--only", "unet-sdxl")
    assert started == ["make-tiny-sdxl", "fill-tiny-sdxl", "unet-sdxl"]
    assert status == 0


def test_graphs_of_another_precision_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, lines, status = _checked(tmp_path, set(), monkeypatch, "--only", "vae", "--folder", str(tmp_path / "one"))
    assert (status, lines[-1].note) == (0, "")
    words = ("--only", "vae", "--provider", "cpu", "--graphs", str(tmp_path / "one" / "graphs"))
    _, lines, status = _checked(tmp_path, set(), monkeypatch, *words)
    assert status == 1
    assert lines[-1].note.endswith("is in fp16, and --provider cpu needs fp32")


def test_sections_without_remaining_time_are_reported_as_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, lines, _ = _checked(tmp_path, set(), monkeypatch, "--only", "vae,image", "--budget", "0")
    assert "vae" not in started
    assert [line.note for line in lines] == ["skipped: no time left"] * 2


@pytest.mark.nightly
def test_the_command_runs_a_section_in_a_process_of_its_own(settings: Settings, tmp_path: Path) -> None:
    out = tmp_path / "new" / "result.jsonl"
    words = ["--tiny", "--provider", "cpu", "--only", "preflight", "--threads", "1", "--graphs", str(settings.graphs)]
    done = subprocess.run(
        [ROOT / "scripts" / "gpu_check", *words, "--out", out],
        env=os.environ | {"PYTHON": sys.executable},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert "2 of 2" not in done.stdout
    assert "1 of 1 targets met" in done.stdout
    assert [line.name for line in read(out)][-1] == "all of it"
    assert (tmp_path / "new" / "result.log").read_text().startswith("== fill-tiny-sd15")


@pytest.mark.parametrize("words", [["--only", "abacus"], ["--packed", "nowhere"]])
def test_unknown_section_or_folder_is_an_error_that_names_it(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        command.main(words)
    assert exit_.value.code == 2
    assert words[1] in capsys.readouterr().err


def test_packed_parts_are_joined_in_any_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tmp_path / "tree"
    (tree / "site").mkdir(parents=True)
    (tree / "graphs").mkdir()
    content = bytes(range(256)) * 40
    (tree / "site" / "module.py").write_bytes(content)
    packed = tmp_path / "packed.tar.xz"
    with tarfile.open(packed, "w:xz") as made:
        for name in ("site", "graphs"):
            made.add(tree / name, name)
    pieces = pack.cut(packed, tmp_path / "out", packed.stat().st_size // 3 + 1)
    assert [piece.name for piece in pieces] == ["piece-1-of-3", "piece-2-of-3", "piece-3-of-3"]
    for piece in (pieces[2], pieces[0], pieces[1]):
        assert pack.main(["--unpack", str(piece.parent), str(tmp_path / "there")]) == 0
    told = capsys.readouterr().out.splitlines()
    assert "missing: piece-1-of-3, piece-2-of-3" in told[0]
    assert "scripts/gpu_check --packed" in told[-1]
    assert (tmp_path / "there" / "site" / "module.py").read_bytes() == content


def test_a_folder_without_a_piece_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack.main(["--unpack", str(tmp_path), str(tmp_path / "there")]) == 1
    assert "piece-N-of-M" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        pack.main(["--unpack", str(tmp_path)])


def _fat_binary(*entries: tuple[int, int, bytes]) -> bytes:
    """In nvcc's format: entries of a kind, an architecture and a payload."""
    body = b""
    for kind, architecture, payload in entries:
        header = kind.to_bytes(2, "little") + bytes(2) + (64).to_bytes(4, "little") + len(payload).to_bytes(8, "little")
        body += (header + bytes(12) + architecture.to_bytes(4, "little")).ljust(64, b"\1") + payload
    head = b"\x50\xed\x55\xba" + (1).to_bytes(2, "little") + (16).to_bytes(2, "little") + len(body).to_bytes(8, "little")
    return head + body


def test_only_machine_code_of_other_gpus_is_zeroed() -> None:
    def library(other: bytes) -> bytes:
        first = _fat_binary((2, 80, other * 100), (2, 90, b"B" * 100), (1, 80, b"C" * 50))
        # The magic number alone may be anything.
        return b"ELF..." + first + b"\x50\xed\x55\xba" + b"x" * 40 + _fat_binary((2, 75, other * 10))

    assert pack.keep_architecture(library(b"A"), 90) == library(b"\0")
    assert pack.keep_architecture(b"nothing of the kind", 90) == b"nothing of the kind"


def test_lines_are_json_objects(tmp_path: Path) -> None:
    append(tmp_path / "a.jsonl", [Line("a", "b", 1.5, "ms", note='"quoted"')])
    assert json.loads((tmp_path / "a.jsonl").read_text())["value"] == 1.5
