"""The sizes of trial runs."""

import json
from pathlib import Path

import pytest
from img2img_server.runtime.onnx.graph_sizes import Sizes


@pytest.mark.parametrize(("levels", "side"), [(0, 64), (2, 64), (3, 64), (4, 128), (5, 256)])
def test_a_trial_has_four_places_at_the_deepest_level(levels: int, side: int, tmp_path: Path) -> None:
    """With one place there, OpenVINO's first run made all later ones NaN in bfloat16."""
    for name, blocks in (("unet", levels), ("vae_decoder", 4)):
        (tmp_path / name).mkdir()
        config = {"block_out_channels": [32] * blocks} if blocks else {}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    trial = Sizes(tmp_path).trial()
    assert (trial.height, trial.width, trial.rows) == (side, side, 1)
    assert side // 8 // 2 ** max(levels - 1, 0) >= 2
