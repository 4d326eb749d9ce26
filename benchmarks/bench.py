"""`scripts/bench` and its sub-commands."""

import argparse
import os
import signal
import sys
import warnings

import bench_attention
import bench_codecs
import bench_export
import bench_growth
import bench_host
import bench_http
import bench_image_prompts
import bench_loras
import bench_padding
import bench_providers
import bench_ray
import bench_request
import bench_rounding
import bench_schedulers
import bench_sessions
import bench_simulated
import bench_speedups
import bench_start
from bench_load import command as bench_load
from bench_load import peers as bench_peers

_DESCRIPTION = """\
Measures the server on the demo model. Run it on an idle machine.

Without a sub-command it runs request to ray with their defaults: about 29 minutes.
"""


def main() -> int:
    """Runs the sub-commands. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(title="sub-commands", metavar="COMMAND")
    known = {
        "request": (bench_request, "one request at a time: overhead, time to SERVING (2 minutes)"),
        "load": (bench_load, "many concurrent requests, compared with three peers (20 minutes)"),
        "simulated": (bench_simulated, "the scheduler on a simulated GPU, compared with two peers (1 minute)"),
        "growth": (bench_growth, "the engine's work between calls by how many requests wait (1 minute)"),
        "sessions": (bench_sessions, "session calls with and without ONNX Runtime's spinning threads (1 minute)"),
        "schedulers": (bench_schedulers, "scheduler steps of a batch, compared with one by one (1 minute)"),
        "codecs": (bench_codecs, "decoding and encoding in a codec process, compared with this process (1 minute)"),
        "http": (bench_http, "OpenAI's image API over HTTP, compared with gRPC, on a fake model (1 minute)"),
        "ray": (bench_ray, "engines on Ray, compared with one in the process: overhead, throughput, memory (3 minutes)"),
    }
    # Too long to run by default.
    apart = {
        "loras": (bench_loras, "steps with LoRAs of requests, against none and against calls divided by LoRA (1 minute)"),
        "image-prompts": (bench_image_prompts, "steps with image prompts of requests, against none (1 minute)"),
        "attention": (bench_attention, "a transformer with and without fused attention on the CPU provider (2 minutes)"),
        "padding": (bench_padding, "images of different token counts in one call, against a call for each (2 minutes)"),
        "peers": (
            bench_peers,
            "many concurrent requests, compared with LitServe and BentoML (10 minutes, after scripts/peers_setup)",
        ),
        "speedups": (bench_speedups, "whole requests with each speedup of a bundle, against exact ones (1 minute)"),
        "rounding": (bench_rounding, "a UNet's error with and without the timestep's angle in bfloat16 (2 minutes)"),
        "export": (bench_export, "exports of real-size models: wall time and peak memory (an hour)"),
        "start": (bench_start, "seconds until SERVING and memory, by number of models (2 minutes)"),
        "host": (bench_host, "the engine's thread between two steps on a GPU, on fake CUDA libraries (1 minute)"),
        "providers": (
            bench_providers,
            "a real-size model on each provider, and whole requests (half an hour after its export)",
        ),
    }
    for name, (module, text) in {**known, **apart}.items():
        sub = commands.add_parser(name, help=text, description=module.__doc__)
        module.configure(sub)
        sub.set_defaults(run=module.run)
    if len(sys.argv) > 1:
        arguments = parser.parse_args()
        status: int = arguments.run(arguments)
        return status
    statuses: list[int] = [module.run(parser.parse_args([name])) for name, (module, _) in known.items()]
    return max(statuses)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    # Read by OpenMP when torch is loaded. Spinning threads would slow down the next measurement.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ["DIFFUSERS_VERBOSITY"] = os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    # Like Ctrl-C: the servers, some of them paused, must not outlive the benchmark.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
