"""A request's fidelity: from its message and from a text, and the messages about speedups."""

import math

from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1 import model_pb2

from img2img_server.bundle.speedups import Speedups
from img2img_server.engine.request import UsedSpeedup
from img2img_server.errors import InvalidField
from img2img_server.support.fidelity import EXACT, LEVELS, MAX_PSNR_DB, Fidelity, Level

_LEVELS: dict[int, Level] = {
    pb.FIDELITY_LEVEL_UNSPECIFIED: "exact",
    pb.FIDELITY_LEVEL_EXACT: "exact",
    pb.FIDELITY_LEVEL_HIGH: "high",
    pb.FIDELITY_LEVEL_FAST: "fast",
}


def fidelity_from(message: pb.TransformRequest) -> Fidelity:
    """The bound of a request. Raises InvalidField for an unknown level and a number that is out of bounds."""
    given = message.fidelity
    bound = given.WhichOneof("bound")
    if bound is None:
        return EXACT
    if bound == "level":
        if given.level not in _LEVELS:
            raise InvalidField("fidelity.level", f"{given.level} is not a known level: set one of {', '.join(LEVELS)}")
        return Fidelity(_LEVELS[given.level])
    value, most = (given.min_psnr_db, MAX_PSNR_DB) if bound == "min_psnr_db" else (given.min_ssim, 1.0)
    if not 0 <= value <= most:  # NaN is not either
        raise InvalidField(f"fidelity.{bound}", f"{value:g} is not in 0 to {most:g}")
    return Fidelity(None, **{bound: value})


def put_fidelity(message: pb.TransformRequest, text: str) -> None:
    """Sets a request's fidelity from a text: a level ("fast"), a number of decibels ("32dB"), or an SSIM ("0.95").

    Raises InvalidField for any other text.
    """
    word = text.strip().lower()
    if word in LEVELS:
        message.fidelity.level = pb.FidelityLevel.Value(f"FIDELITY_LEVEL_{word.upper()}")
        return
    number, is_psnr = (word.removesuffix("db"), True) if word.endswith("db") else (word, False)
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        shown = text[:40]
        raise InvalidField(
            "fidelity", f"'{shown}' is neither {', '.join(LEVELS)}, nor a PSNR such as 32dB, nor an SSIM such as 0.95"
        )
    setattr(message.fidelity, "min_psnr_db" if is_psnr else "min_ssim", value)


def used_message(used: UsedSpeedup | None) -> pb.UsedSpeedup | None:
    """The speedup that a request ran with, as the response has it."""
    if used is None:
        return None
    return pb.UsedSpeedup(name=used.name, times_faster=used.times_faster, min_psnr_db=used.psnr_db, min_ssim=used.ssim)


def speedup_messages(speedups: Speedups) -> list[model_pb2.Speedup]:
    """The speedups of a model as GetModel lists them."""
    return [
        model_pb2.Speedup(
            name=one.name,
            times_faster=one.times_faster,
            min_psnr_db=one.psnr_db,
            mean_psnr_db=one.mean_psnr_db,
            min_ssim=one.ssim,
            mean_ssim=one.mean_ssim,
            min_inference_steps=speedups.least_steps,
            max_guidance_scale=speedups.most_guidance,
        )
        for one in speedups.table
    ]
