"""A process that makes images with one of several libraries that run Stable Diffusion on a CPU.

`scripts/bench providers` starts one process per library and runs them in turns. A line on stdin is the number of steps of one
image; the answer is a line of JSON with the seconds it took. The image is written to a file.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

PROMPT = "A beautiful landscape with mountains and a lake at sunset"
STRENGTH, STEPS, GUIDANCE, SEED = 0.8, 25, 7.5, 1

Draw = Callable[[Image.Image, int], Image.Image]
"""Makes an image from a source and a number of steps."""


def ours(arguments: argparse.Namespace) -> Draw:
    """The server's pipeline, without a server and a cache."""
    from img2img_server.bundle.manifest import read_manifest
    from img2img_server.engine.cache import Cache
    from img2img_server.engine.request import Request, run_alone
    from img2img_server.runtime.execution import Execution
    from img2img_server.runtime.loader import load_pipeline

    # In bfloat16 only if it was requested.
    execution = Execution(arguments.provider, arguments.threads, "auto" if arguments.arithmetic == "bf16" else "fp32")
    pipeline = load_pipeline(arguments.model, read_manifest(arguments.model), execution, Cache(0))

    def draw(image: Image.Image, steps: int) -> Image.Image:
        return run_alone(pipeline, Request("", image, PROMPT, None, STRENGTH, steps, GUIDANCE, (SEED,)))[0]

    return draw


def diffusers(arguments: argparse.Namespace) -> Draw:
    """diffusers on PyTorch, channels last."""
    import torch
    from diffusers import AutoPipelineForImage2Image

    torch.set_num_threads(arguments.threads)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.arithmetic]
    pipe = AutoPipelineForImage2Image.from_pretrained(str(arguments.model), torch_dtype=kind)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    return _called(pipe)


def optimum(arguments: argparse.Namespace) -> Draw:
    """optimum's pipeline on ONNX Runtime, from the same bundle."""
    from onnxruntime import SessionOptions
    from optimum.onnxruntime import ORTPipelineForImage2Image

    options = SessionOptions()
    options.intra_op_num_threads = arguments.threads
    return _called(ORTPipelineForImage2Image.from_pretrained(str(arguments.model), export=False, session_options=options))


def optimum_intel(arguments: argparse.Namespace) -> Draw:
    """optimum-intel's pipeline on OpenVINO. The PyTorch model is converted once."""
    from optimum.intel import OVStableDiffusionImg2ImgPipeline

    folder = arguments.model.with_name(f"{arguments.model.name}-openvino")
    if not (folder / "model_index.json").is_file():
        made = OVStableDiffusionImg2ImgPipeline.from_pretrained(
            str(arguments.model), export=True, compile=False, load_in_8bit=False
        )
        made.save_pretrained(folder)
        del made
    config = {"INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[arguments.arithmetic]}
    config |= {"INFERENCE_NUM_THREADS": str(arguments.threads), "NUM_STREAMS": "1", "PERFORMANCE_HINT": "LATENCY"}
    return _called(OVStableDiffusionImg2ImgPipeline.from_pretrained(str(folder), ov_config=config))


WAYS = {"ours": ours, "diffusers": diffusers, "optimum": optimum, "optimum-intel": optimum_intel}


def _called(pipe: Any) -> Draw:
    import torch

    pipe.set_progress_bar_config(disable=True)

    def draw(image: Image.Image, steps: int) -> Image.Image:
        made: Image.Image = pipe(
            PROMPT,
            image=image,
            strength=STRENGTH,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            generator=torch.Generator("cpu").manual_seed(SEED),
        ).images[0]
        return made

    return draw


def main() -> None:
    """Loads the model, prints an empty JSON object, and makes images until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("model", type=Path)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--arithmetic", choices=("fp32", "bf16"), default="fp32")
    arguments = parser.parse_args()
    _answer(WAYS[arguments.way](arguments), arguments)


def _answer(draw: Draw, arguments: argparse.Namespace) -> None:
    image = Image.linear_gradient("L").resize((arguments.size, arguments.size)).convert("RGB")
    # Libraries may print to stdout, which carries the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps({}), file=answers, flush=True)
    for line in sys.stdin:
        begun = time.perf_counter()
        made = draw(image, int(line))
        seconds = time.perf_counter() - begun
        made.save(arguments.image)
        print(json.dumps({"seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    main()
