"""Measure a demo model: `python demo/measure.py` prints its figures and writes a sheet to look at."""

import argparse
from pathlib import Path

import numpy as np
import torch
from autoencoder import edge_energy, encode, reconstruction_psnr
from diffusers import ControlNetModel, StableDiffusionControlNetImg2ImgPipeline, StableDiffusionImg2ImgPipeline
from judge import PHRASES, Case, Floats, drawn_outlines, keeps_ridge, make_cases, transform
from PIL import Image
from posters import outlines
from posterset import unseen_posters


def sheet(rows: list[list[Floats]]) -> Image.Image:
    """Images of H x W x 3 in 0..1 in rows and columns."""
    pixels = np.concatenate([np.concatenate(row, axis=1) for row in rows], axis=0)
    return Image.fromarray(np.round(np.clip(pixels, 0, 1) * 255).astype(np.uint8))


def report_autoencoder(pipeline: StableDiffusionImg2ImgPipeline) -> None:
    """Print the quality of reconstructions and the spread of latents on unseen posters."""
    unseen = unseen_posters(32)
    vae = pipeline.vae
    spread = encode(vae, unseen).std(dim=(0, 2, 3))
    print(f"autoencoder: {reconstruction_psnr(vae, unseen):.1f} dB on 32 unseen layouts")
    print(f"edges have {edge_energy(vae, unseen):.2f} of their energy; latents spread {spread.min():.2f} to {spread.max():.2f}")


def report_moods(pipeline: StableDiffusionImg2ImgPipeline, cases: list[Case]) -> list[list[Floats]]:
    """Print how many cases follow each mood, by full captions and by the bare phrase; return the captions' images by mood."""
    columns = []
    for mood, phrase in PHRASES.items():
        for name, prompts in (("caption", [case.caption(mood) for case in cases]), ("phrase", [phrase] * len(cases))):
            images = transform(pipeline, cases, prompts, strength=0.8)
            follows = sum(case.follows(image, mood) for case, image in zip(cases, images, strict=True))
            nearest = sum(case.nearest_mood(image) == mood for case, image in zip(cases, images, strict=True))
            print(f"{phrase}, {name}: {follows} of {len(cases)} follow, {nearest} nearest to it", flush=True)
            if name == "phrase":
                columns.append(images)
    return columns


def report_outlines(pipeline: StableDiffusionImg2ImgPipeline, controlnet: Path, cases: list[Case]) -> None:
    """Print in how many images of each mood the outlines are those of the layout that the ControlNet is shown, the next one, and
    not those of the source or of any other."""
    net = ControlNetModel.from_pretrained(controlnet, dtype=torch.float32)
    controlled = StableDiffusionControlNetImg2ImgPipeline(**pipeline.components, controlnet=net, requires_safety_checker=False)
    controlled.set_progress_bar_config(disable=True)
    shown = [Image.fromarray(outlines(case.geometry)).convert("RGB") for case in cases]
    for phrase in PHRASES.values():
        images = transform(controlled, cases, [phrase] * len(cases), strength=0.8, control_image=[*shown[1:], shown[0]])
        drawn = sum(drawn_outlines(image, cases) == (index + 1) % len(cases) for index, image in enumerate(images))
        print(f"{phrase}: {drawn} of {len(cases)} have the outlines of the control image", flush=True)


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="pipeline to measure")
    parser.add_argument("--controlnet", type=Path, help="a ControlNet of outlines to measure, too")
    parser.add_argument("--sheet", type=Path, help="file for a sheet: the source and its image for each bare phrase")
    parser.add_argument("--cases", type=int, default=20, help="unseen layouts")
    parser.add_argument("--rows", type=int, default=6, help="layouts on the sheet")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(arguments.model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    report_autoencoder(pipeline)
    cases = make_cases(arguments.cases)
    columns = report_moods(pipeline, cases)
    half = transform(pipeline, cases, [case.caption("sunset") for case in cases], strength=0.65)
    kept = sum(keeps_ridge(image, cases, index) for index, image in enumerate(half))
    print(f"ridge line at strength 0.65: {kept} of {len(cases)} nearest to their own source")
    if arguments.controlnet:
        report_outlines(pipeline, arguments.controlnet, cases)
    if arguments.sheet:
        rows = [[case.source, *(column[index] for column in columns)] for index, case in enumerate(cases[: arguments.rows])]
        sheet(rows).save(arguments.sheet)


if __name__ == "__main__":
    main()
