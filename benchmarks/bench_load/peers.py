"""Compares the server with LitServe and BentoML under load: `scripts/bench load` with other defaults."""

import argparse

from bench_load import command
from bench_load.command import run as run


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `scripts/bench load`."""
    command.configure(parser)
    parser.set_defaults(servers=("ours", "litserve", "bentoml"), workloads=("alone", "uniform", "crowd", "saturation"))
