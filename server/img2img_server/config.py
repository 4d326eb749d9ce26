"""The server's configuration: every setting once, with its default, checked when it is made."""

from dataclasses import dataclass, field
from pathlib import Path

from img2img_server.engine.scheduler import Limits
from img2img_server.execution import Execution
from img2img_server.images import ImageLimits

DEFAULT_PROMPT = "A beautiful landscape with mountains and a lake at sunset"
DEFAULT_STRENGTH = 0.8
DEFAULT_STEPS = 25
DEFAULT_GUIDANCE = 7.5
MAX_GUIDANCE = 30.0
MAX_PROMPT = 4096
"""Characters. Text encoders read some 77 tokens; tokenizing a book would only hold up the engine."""


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What `img2img serve` runs with.

    `models` is a folder of bundles, or one bundle. Port 0 takes a free one; `port_file` is written with the port once the
    server is SERVING. `grace` is how many seconds running requests get after SIGTERM. `execution` is how models are run.
    `cache_bytes` hold what was encoded of prompts and pictures, 0 for none. `warm_up` is how many
    seconds each model is measured for before it is served. `trace` gets the device's timeline. `allow_unverified` serves
    bundles, too, whose verification failed. Raises ValueError for a setting that cannot work.
    """

    models: Path
    host: str = "127.0.0.1"
    port: int = 50051
    port_file: Path | None = None
    default_model: str | None = None
    execution: Execution = field(default_factory=Execution)
    grace: float = 30.0
    max_steps: int = 100
    max_image_count: int = 8
    cache_bytes: int = 256 * 2**20
    warm_up: float = 10.0
    trace: Path | None = None
    allow_unverified: bool = False
    limits: Limits = field(default_factory=Limits)
    image_limits: ImageLimits = field(default_factory=ImageLimits)

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, the least is {least}")
        for group in (self.limits, self.image_limits):
            for name in group.__slots__:
                if getattr(group, name) < 1:
                    raise ValueError(f"{name} is {getattr(group, name)}, the least is 1")

    @property
    def max_message_bytes(self) -> int:
        """The largest message taken from the network: a source picture as a base64 URI and something beside it."""
        return 2 * self.image_limits.max_bytes + 2**20


_LEAST = {"port": 0, "grace": 0, "max_steps": 1, "max_image_count": 1, "cache_bytes": 0, "warm_up": 0}
