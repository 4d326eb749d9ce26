"""Compares providers and libraries for a Stable Diffusion 1.5 of real size on this CPU: parts and whole requests.

Parts: ONNX Runtime's CPU provider in fp32 and on the int8 bundle (static int8), OpenVINO with dynamic and with fixed shapes
in fp32 and bfloat16, PyTorch with channels last. Requests: the server's pipeline, diffusers, optimum and optimum-intel, each
in its own process, with the image's PSNR against diffusers in fp32. All take turns: compare the ratios.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bench_load.servers import optimum_python
from bench_models import saved_model
from rich.console import Console
from rich.table import Table

_BENCH = Path(".bench")
_VARIANTS = ("cpu", "int8", "openvino", "openvino-static", "openvino-bf16", "openvino-static-bf16", "torch", "torch-bf16")
_COMPONENTS = ("unet", "vae_encoder", "vae_decoder", "text_encoder")
_PEERS = ("ours", "ours-openvino", "ours-openvino-bf16", "ours-int8", "diffusers", "diffusers-bf16", "optimum", "optimum-intel")
_LEAST_ROUNDS = 3


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this sub-command."""
    add = parser.add_argument
    add(
        "--model",
        default="sd15",
        metavar="M",
        help="sd15 or tiny: random weights of this size; or the folder of a Stable Diffusion model in diffusers' layout "
        "(default: %(default)s)",
    )
    add(
        "--variants",
        default="cpu,int8,openvino-static,openvino-static-bf16,torch,torch-bf16",
        metavar="V,...",
        help=f"variants, of {', '.join(_VARIANTS)}",
    )
    add("--components", default=",".join(_COMPONENTS), metavar="C,...", help="parts, of %(default)s (default: all)")
    add("--sizes", default="256,512", metavar="N,...", help="sides of images in pixels (default: %(default)s)")
    add("--rounds", type=int, default=5, help="turns of each variant (default: %(default)s)")
    add("--peers", default="", metavar="P,...", help=f"also whole requests, by {', '.join(_PEERS)} (all must fit into memory)")
    add("--request-size", type=int, default=256, metavar="N", help="side of a request's image in pixels (default: %(default)s)")
    add("--request-rounds", type=int, default=3, metavar="N", help="turns of each peer (default: %(default)s)")
    add("--request-steps", type=int, default=25, metavar="N", help="steps of a request, at strength 0.8 (default: %(default)s)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="CPU threads (default: all)")
    add("--intel-packages", type=Path, metavar="DIR", help="folder of optimum-intel and its dependencies, in its versions")
    add(
        "--json",
        type=Path,
        default=_BENCH / "providers.json",
        metavar="FILE",
        help="write results to this file (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Makes missing models and bundles (minutes each), measures, prints tables and draws them. Real size needs 20 GB of disk and
    of memory."""
    folder = Path(arguments.model)
    model = folder if (folder / "model_index.json").is_file() else saved_model(arguments.model, "fp32")
    variants, peers = arguments.variants.split(","), [name for name in arguments.peers.split(",") if name]
    for name, known in ((variants, _VARIANTS), (peers, _PEERS), (arguments.components.split(","), _COMPONENTS)):
        if unknown := [word for word in name if word and word not in known]:
            raise SystemExit(f"unknown: {', '.join(unknown)}; known are {', '.join(known)}")
    bundles = {"fp32": _bundle(model, folder.name, "fp32")}
    if "int8" in variants or "ours-int8" in peers:
        bundles["int8"] = _bundle(model, folder.name, "int8")
    found: dict[str, Any] = {"machine": None, "parts": [], "requests": []}
    if any(variants):
        found["parts"] = [*_parts(arguments, model, bundles)]
    if peers:
        bundles = {name: folder.absolute() for name, folder in bundles.items()}
        found["requests"] = _requests(arguments, model, bundles, peers)
    from img2img_server.runtime.common.cpu import machine

    found["machine"] = machine()
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    _draw([*found["parts"], *found["requests"]], arguments.json.with_suffix(".png"))
    return 0


def _draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Draws a panel for each part and the requests: speed relative to the first variant, whiskers at the quartiles."""
    from matplotlib.figure import Figure

    titles = list(dict.fromkeys(line["what"] for line in lines))
    figure = Figure(figsize=(4.2 * len(titles), 3.4), layout="constrained")
    for number, title in enumerate(titles, start=1):
        panel = figure.add_subplot(1, len(titles), number)
        own = [line for line in lines if line["what"] == title][::-1]
        middle = [line["ratio"][1] for line in own]
        spread = [[line["ratio"][1] - line["ratio"][0] for line in own], [line["ratio"][2] - line["ratio"][1] for line in own]]
        panel.barh([line["variant"] for line in own], middle, xerr=spread, color="#4878a8", ecolor="#808080", capsize=2)
        panel.axvline(1.0, color="black", linewidth=0.8)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel(f"times as fast as {own[-1]['variant']}")
    figure.savefig(path, dpi=110)


def _bundle(model: Path, name: str, precision: str) -> Path:
    folder = _BENCH / "bundles" / f"{name}-{precision}"
    if not (folder / "manifest.json").is_file():
        command = [sys.executable, "-m", "img2img_cli", "export", str(model), "--output", str(folder)]
        subprocess.run([*command, "--precision", precision, "--backend", "onnx"], check=True)
    return folder


def _parts(arguments: argparse.Namespace, model: Path, bundles: Mapping[str, Path]) -> Iterator[dict[str, Any]]:
    """Measures one part at a time, so that only its variants are in memory."""
    from bench_provider_works import error_of, feed_of, works_of
    from img2img_server.tools.bench_measuring import TimedCase, run_rounds

    for component in arguments.components.split(","):
        for size in (int(word) for word in arguments.sizes.split(",")):
            if component == "text_encoder" and size != int(arguments.sizes.split(",")[0]):
                continue
            feed = feed_of(component, model, size)
            works = works_of(component, feed, model, bundles, arguments.variants.split(","), arguments.threads)
            errors = {}
            for name, work in works.items():
                work.run()
                errors[name] = error_of(next(iter(works.values())), work)
            cases = [TimedCase(component, name, (size, size), 1, work) for name, work in works.items()]
            turns = run_rounds(cases, lambda: None, time.perf_counter)
            for _ in range(max(_LEAST_ROUNDS, arguments.rounds)):
                next(turns)
            title = f"{component}, {size} px" if component != "text_encoder" else component
            seconds = {case.provider: case.seconds for case in cases}
            yield from _printed(title, seconds, {name: f"{error:.1e}" for name, error in errors.items()}, "error")


def _requests(arguments: argparse.Namespace, model: Path, bundles: Mapping[str, Path], peers: list[str]) -> list[dict[str, Any]]:
    """Measures whole requests. The source has the size of the result."""
    from img2img_server.runtime.accuracy_check import psnr_db
    from PIL import Image

    images = _BENCH / "images"
    images.mkdir(parents=True, exist_ok=True)
    started = {name: _start(name, arguments, model, bundles, images) for name in peers}
    try:
        seconds: dict[str, list[float]] = {name: [] for name in peers}
        for process in started.values():
            _answer(process)
        for round_ in range(arguments.request_rounds + 1):
            order = list(started.items())
            for name, process in order if round_ % 2 else reversed(order):
                assert process.stdin is not None, "it was opened as a pipe"
                # The first round is a warm-up with few steps.
                print(arguments.request_steps if round_ else 2, file=process.stdin, flush=True)
                took = _answer(process)["seconds"]
                if round_:
                    seconds[name].append(took)
                print(f"request {round_}: {name} {took:.2f} s", file=sys.stderr, flush=True)
    finally:
        for process in started.values():
            process.kill()
            process.wait()
    reference = images / ("diffusers.png" if "diffusers" in peers else f"{peers[0]}.png")
    drawn = {name: Image.open(images / f"{name}.png") for name in peers}
    decibels = {name: f"{psnr_db(image, Image.open(reference)):.1f} dB" for name, image in drawn.items()}
    title = f"img2img, {arguments.request_size} px, {arguments.request_steps} steps x 0.8"
    return list(_printed(title, seconds, decibels, f"PSNR against {reference.stem}"))


def _start(
    name: str, arguments: argparse.Namespace, model: Path, bundles: Mapping[str, Path], images: Path
) -> "subprocess.Popen[str]":
    way = "ours" if name.startswith("ours") else name.removesuffix("-bf16")
    path = model if way in ("diffusers", "optimum-intel") else bundles["int8" if name == "ours-int8" else "fp32"]
    python = optimum_python() if way == "optimum" else sys.executable
    command = [python, "-m", "bench_peers.image", way, str(path), "--image", str(images / f"{name}.png")]
    command += ["--size", str(arguments.request_size), "--threads", str(arguments.threads)]
    command += ["--arithmetic", "bf16"] if name.endswith("bf16") else []
    command += ["--provider", "openvino"] if name.startswith("ours-openvino") else []
    own = arguments.intel_packages if name == "optimum-intel" else None
    paths = [str(folder.absolute()) for folder in (own, Path(__file__).parent) if folder] + [os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": ":".join(filter(None, paths)), "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _answer(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdout is not None, "it was opened as a pipe"
    for line in process.stdout:
        if line.startswith("{"):
            answer: dict[str, Any] = json.loads(line)
            return answer
    raise SystemExit(f"ended with status {process.wait()}: {' '.join(map(str, process.args))}")  # type: ignore[arg-type]


def _printed(title: str, seconds: Mapping[str, list[float]], notes: Mapping[str, str], note: str) -> Iterator[dict[str, Any]]:
    """Prints a table and yields its lines. Ratios are relative to the first in the same round."""
    from img2img_server.tools.bench_model import quartiles

    table = Table("variant", "ms", "quartiles", "times as fast as the first", note, title=title)
    first = next(iter(seconds.values()))
    show: Callable[[float], str] = lambda value: f"{value * 1e3:.4g}"  # noqa: E731
    for name, own in seconds.items():
        low, middle, high = quartiles(own)
        ratios = quartiles([theirs / ours for theirs, ours in zip(first, own, strict=True)])
        ratio = f"{ratios[1]:.2f} ({ratios[0]:.2f} to {ratios[2]:.2f})"
        table.add_row(name, show(middle), f"{show(low)} to {show(high)}", ratio, notes[name])
        yield {"what": title, "variant": name, "seconds": own, "ratio": ratios, note: notes[name]}
    Console(width=120).print(table)
