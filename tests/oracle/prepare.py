"""Makes the test data of this folder in $IMG2IMG_ORACLE: `models` by the old versions of the oracle's environment, `bundles` of
them by the versions of requirements.lock. The two do not fit into one environment."""

import os
import sys
from dataclasses import replace
from pathlib import Path

FOLDER = Path(os.environ["IMG2IMG_ORACLE"])
MODELS = ("sd1", "sd2", "sdxl", "refiner", "lcm", "sdxl-overflow")
HALF = ("sdxl-overflow",)
"""The models whose bundles are in fp16."""


def models() -> None:
    """Saves the tiny models."""
    import tiny_models

    for name in MODELS:
        tiny_models.build(name, FOLDER / "models" / name)


def bundles() -> None:
    """Exports them."""
    from img2img_export.build import export_model
    from img2img_export.options import ExportOptions
    from short_exports import cut_short

    with cut_short():
        for name in MODELS:
            options = ExportOptions(source=str(FOLDER / "models" / name), output=FOLDER / "bundles" / name)
            made = export_model(replace(options, precision="fp16") if name in HALF else options)
            print(made.summary(), flush=True)


if __name__ == "__main__":
    {"models": models, "bundles": bundles}[sys.argv[1]]()
