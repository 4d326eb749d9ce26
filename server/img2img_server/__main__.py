"""`img2img serve`: makes a configuration of flags, environment variables and a file, and runs a server."""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from img2img_server.backends.base import Backend
    from img2img_server.config import ServerConfig
    from img2img_server.settings.sources import Configured

VARIABLES = "IMG2IMG_"
"""Prefix of the settings' environment variables."""
CONFIG_VARIABLE = "IMG2IMG_CONFIG"
CLIENT_VARIABLES = (
    "IMG2IMG_TARGET",
    "IMG2IMG_TOKEN",
    "IMG2IMG_CA",
    "IMG2IMG_CLIENT_CERTIFICATE",
    "IMG2IMG_CLIENT_KEY",
)
"""Variables of the client's commands, which are not errors in the server's environment."""

_USAGE = "%(prog)s [--models DIR] [--config FILE] [--print-config] [SETTING ...]"
_EPILOG = """\
Each setting is a flag (--max-batch-size 8), a variable (IMG2IMG_MAX_BATCH_SIZE=8) or a key in the TOML file that --config names
(max_batch_size = 8 in the table [limits]). A flag overrides a variable, and a variable overrides the file.
--print-config prints all settings and their sources as such a file. BYTES can be 500MB or 1.5GiB, SECONDS 90s, 15m or 24h.

examples:
  img2img serve                                 the demo model, exported on first use (only in a checkout)
  img2img serve --models models                 every bundle in the folder, on 127.0.0.1:50051
  img2img serve --models models/sdxl --port 0   one bundle, on a free port
  img2img serve --models models --print-config > server.toml
  img2img serve --config server.toml

The server answers health checks (grpc.health.v1) and reflection. SIGTERM drains it: new requests are refused, running
requests get --grace seconds to finish, and the process exits at most 5 seconds later. A second SIGTERM stops it at once.

exit status: 0 drained; 1 failed to start; 2 invalid setting; 70 a model call did not return within --watchdog seconds;
130 or 143 SIGINT or SIGTERM before the server was ready or drained.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `img2img serve`."""
    from img2img_server.config import ServerConfig
    from img2img_server.settings.setting import settings_of
    from img2img_server.settings.sources import declare

    parser.usage = _USAGE
    parser.allow_abbrev = False  # otherwise a new flag could change an abbreviation's meaning
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", type=Path, metavar="FILE", help=f"read settings from this TOML file (or {CONFIG_VARIABLE})")
    parser.add_argument("--print-config", action="store_true", help="print all settings and their sources as TOML, and exit")
    declare(parser, settings_of(ServerConfig))


def configured(arguments: argparse.Namespace, variables: Mapping[str, str]) -> "Configured[ServerConfig]":
    """The server's configuration, from its flags, environment `variables`, and the configuration file that either names.

    Raises SettingError, a ValueError, and OSError if the file cannot be read.
    """
    from img2img_server.config import ServerConfig
    from img2img_server.settings.setting import settings_of
    from img2img_server.settings.sources import Environment, given, resolve

    file = arguments.config
    if file is None and CONFIG_VARIABLE in variables:
        file = Path(variables[CONFIG_VARIABLE])
    environment = Environment(variables, VARIABLES, (CONFIG_VARIABLE, *CLIENT_VARIABLES))
    return resolve(ServerConfig, given(settings_of(ServerConfig), arguments), environment, file)


def run(arguments: argparse.Namespace) -> int:
    """Serves until a signal. Returns 0 after a drain, 1 if it failed to start, 2 for an invalid setting."""
    from img2img_server.settings.sources import MissingSetting

    try:
        found = configured(arguments, os.environ)
    except MissingSetting as error:
        if error.name != "models" or arguments.print_config:
            return _complain(error, 2)
        from img2img_server.tools import demo

        try:
            arguments.models = Path()
            configured(arguments, os.environ)  # reports invalid settings before the demo model's export, which takes minutes
            arguments.models = demo.obtain(lambda line: print(f"img2img serve: {line}", file=sys.stderr, flush=True))
            found = configured(arguments, os.environ)
        except demo.DemoUnavailable as problem:
            return _complain(ValueError(f"{error}; {problem}"), 2)
        except (ValueError, OSError) as problem:
            return _complain(problem, 2)
    except (ValueError, OSError) as error:
        return _complain(error, 2)
    if arguments.print_config:
        from img2img_server.settings.sources import as_toml

        print(as_toml(found), end="")
        return 0
    # The libraries read these at import, and log warnings otherwise.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Hides progress bars of loading weights, also in transformers.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # gRPC logs a line for each failed handshake and each compressed message, so any client could fill the log.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # OpenMP reads it when torch is loaded. Threads that spin while they wait take cores from working threads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import asyncio

    from img2img_server.telemetry import logs

    logs.configure(found.config.telemetry.log_format, found.config.telemetry.log_level)
    return asyncio.run(_serve(found.config))


def _complain(error: Exception, status: int) -> int:
    """Prints the error in one line and returns `status`."""
    line = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename is not None else str(error)
    print(f"img2img serve: {line}", file=sys.stderr)
    return status


async def _serve(config: "ServerConfig") -> int:
    from img2img_server.api.lifecycle import live
    from img2img_server.api.server import Server
    from img2img_server.api.transport import raise_file_limit
    from img2img_server.errors import BundleError
    from img2img_server.models.memory import bound_arenas

    raise_file_limit()
    bound_arenas()
    try:
        backend = _backend(config)
        return await live(Server(config, backend))
    except (BundleError, OSError) as error:
        return _complain(error, 1)
    except ValueError as error:
        return _complain(error, 2)


def _backend(config: "ServerConfig") -> "Backend":
    """The backend of the setting `engine`. Raises ValueError if its packages are not installed."""
    if config.engine == "local":
        from img2img_server.backends.local import local

        return local(config)
    from img2img_server.backends.ray.backend import cluster

    return cluster(config)


if __name__ == "__main__":
    _parser = argparse.ArgumentParser("img2img serve")
    configure(_parser)
    sys.exit(run(_parser.parse_args()))
