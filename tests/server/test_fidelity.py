"""The bound of a request: how each API takes it, and how the speedup that was used is reported."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_image_service import image_bytes
from fakes import FakePipeline
from http_calls import EDITS, ask, serving
from img2img.v1 import image_to_image_pb2 as pb
from img2img_cli.__main__ import main
from img2img_client import Client, read_provenance, recorded_options
from img2img_server.api.fidelity import fidelity_from, put_fidelity
from img2img_server.bundle.speedups import Speedup, Speedups
from img2img_server.engine.request import RequestWarning, UsedSpeedup
from img2img_server.errors import InvalidField
from img2img_server.models.registry import Model, ModelRegistry
from img2img_server.support.fidelity import EXACT, Fidelity
from running import RunningServer, manifest, store

SOURCE = image_bytes(size=(32, 16))
USED = UsedSpeedup("guidance kept", 1.5, 33.5, 0.97)
KEPT = Speedup(
    "guidance kept", 0.4, 2, keeps_guidance=True, keeps_features=False, times_faster=1.4, cpu_times_faster=1.3,
    psnr_db=33.5, mean_psnr_db=40.0, ssim=0.97, mean_ssim=0.99,
)  # fmt: skip
TABLE = Speedups((KEPT,), 9, 25, 7.5)


@pytest.fixture(scope="module")
def pipeline() -> FakePipeline:
    return FakePipeline()


@pytest.fixture(scope="module")
def server(pipeline: FakePipeline) -> Iterator[RunningServer]:
    def load() -> ModelRegistry:
        (model,) = store(m=pipeline)
        measured = dataclasses.replace(manifest("acme/m"), speedups=TABLE)
        return ModelRegistry([Model("m", measured, model.pipeline)], default="m")

    with serving(load=load) as server:
        yield server


@pytest.fixture
def client(server: RunningServer, pipeline: FakePipeline) -> Iterator[Client]:
    pipeline.speedup, pipeline.warnings = USED, ()
    with Client(f"127.0.0.1:{server.port}", timeout=60) as client:
        yield client


TEXTS = {
    "exact": EXACT, "fast": Fidelity("fast"), " HIGH ": Fidelity("high"), "32dB": Fidelity(None, min_psnr_db=32.0),
    "32.5 db": Fidelity(None, min_psnr_db=32.5), "0.95": Fidelity(None, min_ssim=0.95), "0": Fidelity(None, min_ssim=0.0),
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_a_level_decibels_or_an_ssim(text: str) -> None:
    message = pb.TransformRequest()
    put_fidelity(message, text)
    assert fidelity_from(message) == TEXTS[text]
    again = pb.TransformRequest()
    put_fidelity(again, str(TEXTS[text]))
    assert fidelity_from(again) == TEXTS[text], "a record can be read again"


@pytest.mark.parametrize("text", ["", "best", "dB", "nan", "nandB", "0,9", "fast!"])
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(InvalidField) as caught:
        put_fidelity(pb.TransformRequest(), text)
    assert caught.value.field == "fidelity"


def test_a_message_without_a_bound_is_exact() -> None:
    for fidelity in (None, pb.Fidelity(), pb.Fidelity(level=pb.FIDELITY_LEVEL_UNSPECIFIED)):
        assert fidelity_from(pb.TransformRequest(fidelity=fidelity)) == EXACT


def test_the_engine_gets_the_bound_and_the_answer_names_the_speedup(client: Client, pipeline: FakePipeline) -> None:
    for options, bound in (
        ({"fidelity": "high"}, Fidelity("high")),
        ({"min_psnr_db": 31.5}, Fidelity(None, min_psnr_db=31.5)),
        ({"min_ssim": 0.9}, Fidelity(None, min_ssim=0.9)),
    ):
        result = client.transform(SOURCE, **options)
        assert pipeline.prepared[-1].request.fidelity == bound
        assert result.speedup is not None
        assert (result.speedup.name, result.speedup.times_faster) == ("guidance kept", 1.5)
        assert (result.speedup.min_psnr_db, result.speedup.min_ssim) == (33.5, 0.97)
    assert client.transform(SOURCE).speedup is None
    assert pipeline.prepared[-1].request.fidelity.is_exact


def test_a_models_speedups_are_listed_with_the_requests_that_they_are_for(client: Client) -> None:
    model = client.model("m")
    assert model.takes("fidelity")
    (one,) = model.speedups
    assert (one.name, one.times_faster, one.min_psnr_db, one.mean_ssim) == ("guidance kept", 1.4, 33.5, 0.99)
    assert (one.min_inference_steps, one.max_guidance_scale) == (25, 7.5)


def test_a_record_has_the_bound_and_is_enough_to_ask_again(client: Client) -> None:
    for options in ({"fidelity": "fast"}, {"min_psnr_db": 31.5}, {"min_ssim": 0.9}):
        record = read_provenance(client.transform(SOURCE, **options).images[0].data)
        assert record is not None
        assert record["speedup"] == "guidance kept"
        again: Any = recorded_options(record)
        assert {name: again[name] for name in options} == options
    record = read_provenance(client.transform(SOURCE).images[0].data)
    assert record is not None
    assert "fidelity" not in record
    assert "fidelity" not in recorded_options(record)
    for damaged in ("best", 5, ["fast"]):
        with pytest.raises(ValueError, match="fidelity is"):
            recorded_options({**record, "fidelity": damaged})


def test_http_takes_a_text_and_answers_with_the_speedup(server: RunningServer, client: Client, pipeline: FakePipeline) -> None:
    answer = ask(server, EDITS, ("prompt", "a lake"), ("fidelity", "31.5dB"))
    assert answer.status == 200, answer.body
    assert pipeline.prepared[-1].request.fidelity == Fidelity(None, min_psnr_db=31.5)
    assert answer.json["speedup"] == {"name": "guidance kept", "times_faster": 1.5, "min_psnr_db": 33.5, "min_ssim": 0.97}


def test_the_command_prints_the_speedup_and_why_there_is_none(
    server: RunningServer, client: Client, pipeline: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.png", f"127.0.0.1:{server.port}"
    source.write_bytes(SOURCE)
    command = ["transform", str(source), "--output", str(tmp_path / "out.png"), "--target", target]
    assert main([*command, "--fidelity", "fast"]) == 0
    assert "m on fake:cpu, 1.50 x less work: guidance kept" in capsys.readouterr().out
    assert main([*command, "--min-psnr", "31.5"]) == 0
    assert pipeline.prepared[-1].request.fidelity == Fidelity(None, min_psnr_db=31.5)
    pipeline.speedup, pipeline.warnings = None, (RequestWarning("fidelity", "no speedup was used", "FIDELITY_EXACT"),)
    capsys.readouterr()
    assert main([*command, "--min-ssim", "0.9"]) == 0
    assert "warning: fidelity: no speedup was used" in capsys.readouterr().err
    assert main(["models", "--speedups", "--target", target]) == 0
    assert "1.40 x at 33.5 dB, SSIM 0.970: guidance kept" in " ".join(capsys.readouterr().out.split())
