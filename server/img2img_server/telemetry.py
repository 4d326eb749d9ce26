"""What the outside is told of the server: metrics, traces, and a line in the log for each call."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from img2img_server.assets import AssetStore
from img2img_server.calls import Call
from img2img_server.config import TelemetrySettings
from img2img_server.engine.cache import Cache
from img2img_server.engine.engine import Accepted, Engine
from img2img_server.engine.request import Event, Request
from img2img_server.engine.spans import Span
from img2img_server.models import ModelStore


@dataclass(slots=True)
class Outcome:
    """How a call ended: the name of its gRPC status, the reason of its ErrorInfo, and whose it was."""

    status: str = "OK"
    reason: str = ""
    client: str = ""


class Trail:
    """Follows one request through the engine."""

    def tell(self, event: Accepted | Event) -> None:
        """Takes notice of an event, in order. Called from any thread, one at a time; must be quick."""


class Telemetry:
    """Metrics, traces and the log of calls. Harmless where nothing of it is configured."""

    def __init__(self, settings: TelemetrySettings) -> None:
        self._settings = settings

    def start(self) -> None:
        """Serves metrics and connects to the collector, where that is configured. Raises OSError where the port is taken."""

    def close(self) -> None:
        """Sends what is left and stops."""

    def watch(self, engine: Engine, models: ModelStore, cache: Cache | None, assets: AssetStore) -> None:
        """From now on, tells of these, too."""

    @contextmanager
    def call(self, call: Call) -> Iterator[Outcome]:
        """Observes one call, whose outcome is known when the block ends."""
        yield Outcome()

    def span(self, span: Span) -> None:
        """Takes notice of a stage that ran on the engine's thread."""

    def trail(self, request: Request) -> Trail:
        """Follows a request of the current call."""
        return Trail()
