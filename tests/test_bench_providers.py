"""`scripts/bench providers`: the compared variants compute the same, so that only their times differ."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import bench_providers
import pytest
from bench_peers import image as peer_image
from bench_provider_works import error_of, feed_of, works_of
from bench_providers import _printed
from img2img_server.runtime.accuracy_check import psnr_db
from PIL import Image


@pytest.mark.parametrize("component", ["unet", "vae_encoder", "vae_decoder", "text_encoder"])
def test_providers_of_a_component_give_the_same_result(
    component: str, bundle: Callable[[str], Path], tiny_model: Callable[[str], Path]
) -> None:
    feed = feed_of(component, tiny_model("sd1"), 64)
    works = works_of(component, feed, tiny_model("sd1"), {"fp32": bundle("sd1")}, ["cpu", "torch"], threads=1)
    assert list(works) == ["cpu", "torch"]
    for work in works.values():
        work.run()
    assert error_of(works["cpu"], works["torch"]) < 1e-4


def test_peers_give_the_same_image_for_a_request(bundle: Callable[[str], Path], tiny_model: Callable[[str], Path]) -> None:
    settings = {"threads": 1, "provider": "cpu", "arithmetic": "fp32"}
    source = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    ours = peer_image.ours(argparse.Namespace(model=bundle("sd1"), **settings))(source, 4)
    theirs = peer_image.diffusers(argparse.Namespace(model=tiny_model("sd1"), **settings))(source, 4)
    assert psnr_db(ours, theirs) > 50


def test_ratios_compare_with_the_first_provider_in_the_same_round(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = _printed("unet", {"cpu": [4.0, 8.0, 4.0], "torch": [2.0, 4.0, 1.0]}, {"cpu": "", "torch": ""}, "error")
    assert first["ratio"] == (1.0, 1.0, 1.0)
    assert second["ratio"][:2] == (2.0, 2.0)
    assert "2.00 (2.00 to 3.00)" in capsys.readouterr().out


def test_bench_providers_prints_its_table(
    bundle: Callable[[str], Path],
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bench_providers, "_BENCH", tmp_path)
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / f"{tiny_model('sd1').name}-fp32").symlink_to(bundle("sd1"))
    parser = argparse.ArgumentParser()
    bench_providers.configure(parser)
    words = ["--model", str(tiny_model("sd1")), "--variants", "cpu,torch", "--components", "vae_decoder", "--sizes", "64"]
    words += ["--rounds", "1", "--threads", "1", "--json", str(tmp_path / "found.json")]
    assert bench_providers.run(parser.parse_args(words)) == 0
    assert "vae_decoder, 64 px" in capfd.readouterr().out
    parts = json.loads((tmp_path / "found.json").read_text())["parts"]
    assert [part["variant"] for part in parts] == ["cpu", "torch"]
    assert (tmp_path / "found.png").is_file()
    with pytest.raises(SystemExit, match="unknown: gpu; known are cpu, int8"):
        bench_providers.run(parser.parse_args([*words, "--variants", "cpu,gpu"]))
