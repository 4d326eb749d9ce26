"""The server's configuration: every setting once, with its default and what it means, checked when it is made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from img2img_server.engine.scheduler import Limits
from img2img_server.execution import Execution
from img2img_server.images import ImageLimits
from img2img_server.settings.setting import check, section, setting

DEFAULT_PROMPT = "A beautiful landscape with mountains and a lake at sunset"
DEFAULT_STRENGTH = 0.8
DEFAULT_STEPS = 25
DEFAULT_GUIDANCE = 7.5
MAX_GUIDANCE = 30.0
MAX_PROMPT = 4096
"""Characters. Text encoders read some 77 tokens; tokenizing a book would only hold up the engine."""


PRELOAD_WORDS = ("default", "all", "none")
"""What `preload` can have in place of ids."""


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Which models are in memory, and which may be fetched. `memory` is in bytes, None for no bound; `preload` has ids, or one of
    PRELOAD_WORDS."""

    memory: int | None = setting(
        None,
        "memory for models; beyond it, those that were not used for longest are unloaded (default: no bound)",
        metavar="BYTES",
        least=1,
        name="models_memory",
    )
    preload: tuple[str, ...] = setting(
        ("default",),
        "models to load before serving, by id; default: the default model; all: as many as the memory holds; none: none. "
        "The others are loaded when a request asks for them",
        metavar="ID[,...]",
    )
    load_on_request: bool = setting(True, "load a model of the store when the first request for it comes")
    allow_downloads: bool = setting(False, "export and load models that are not in the store, from repositories of the hub")
    download_repos: tuple[str, ...] = setting(
        (), "repositories that may be downloaded, as patterns such as stabilityai/*", metavar="PATTERN[,...]"
    )

    def __post_init__(self) -> None:
        if self.allow_downloads and not self.download_repos:
            raise ValueError(
                "allow_downloads needs download_repos: the repositories that may be downloaded, such as stabilityai/*"
            )


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """The files, in PEM, of TLS. They are read again when they change. With `client_ca`, clients must show a certificate of
    its."""

    certificate: Path | None = setting(None, "the server's certificate chain", metavar="FILE")
    key: Path | None = setting(None, "the private key of the certificate", metavar="FILE")
    client_ca: Path | None = setting(None, "take only clients with a certificate that one of these signed", metavar="FILE")

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("tls_certificate and tls_key belong together: set both or none")
        if self.client_ca is not None and self.certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key")


@dataclass(frozen=True, slots=True)
class AssetSettings:
    """Where pictures are kept: any URL that fsspec opens. `quota` is in bytes, `client_quota` those of one token's name (None: no
    bound), `max_age` in seconds since a picture's last use."""

    url: str | None = setting(
        None,
        "a folder or URL (s3://bucket/folder) to keep pictures in (default: ~/.cache/img2img/assets; none: keep none)",
        name="assets",
        metavar="URL",
        is_path=lambda text: text != "none" and "://" not in text,
    )
    quota: int = setting(2**30, "most bytes of pictures that are kept", name="assets_quota", metavar="BYTES", least=1)
    client_quota: int | None = setting(
        None,
        "most bytes of pictures that are kept for one token's name (default: no bound but assets_quota)",
        name="assets_client_quota",
        metavar="BYTES",
        least=1,
    )
    max_age: float = setting(
        24 * 3600.0, "seconds after its last use that a picture is kept", name="assets_max_age", metavar="SECONDS", least=1
    )


@dataclass(frozen=True, slots=True)
class CodecSettings:
    """Processes that decode and encode images, None for one more than there are cores, 9 at most. `memory` bounds the bytes of
    images that are received or decoded."""

    decoders: int | None = setting(
        None, "processes that decode images (default: cores + 1, 9 at most)", metavar="N", least=1, name="decode_processes"
    )
    encoders: int | None = setting(
        None, "processes that encode images (default: cores + 1, 9 at most)", metavar="N", least=1, name="encode_processes"
    )
    memory: int = setting(
        4 * 2**30,
        "memory for images that are received or decoded; beyond it, requests are refused",
        metavar="BYTES",
        least=1,
        name="image_memory",
    )


@dataclass(frozen=True, slots=True)
class SourceSettings:
    """Which addresses `image.uri` may have beside data: and asset:. `http_seconds` bounds one download."""

    allow_http: bool = setting(False, "fetch http and https addresses of the public internet, never of private networks")
    http_seconds: float = setting(10.0, "longest that fetching an address may take", metavar="SECONDS", least=0.1)
    file_root: Path | None = setting(None, "allow file: addresses below this folder", metavar="DIR")


@dataclass(frozen=True, slots=True)
class TelemetrySettings:
    """What is told to the outside, and how. Metrics are served over HTTP where `metrics_port` is set, 0 for a free one."""

    metrics_port: int | None = setting(
        None,
        "serve Prometheus metrics over HTTP on this port, 0 for a free one (default: none are served)",
        metavar="PORT",
        least=0,
        most=65535,
    )
    metrics_host: str = setting("127.0.0.1", "address to serve metrics on")
    otlp_endpoint: str | None = setting(
        None, "send OpenTelemetry traces to this collector, such as http://localhost:4317", metavar="URL"
    )
    log_format: Literal["text", "json"] = setting("text", "how the log on standard error is written", choices=("text", "json"))
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "info",
        "what is written to the log, and what is worse; debug also has where a model failed to load",
        choices=("debug", "info", "warning", "error"),
    )


@dataclass(frozen=True, slots=True)
class RaySettings:
    """Where engines run with `engine` "ray": as replicas of one Ray Serve application, which all servers of its name share.

    `address` None starts a cluster on this machine, which ends with this server. `max_replicas` None is `min_replicas`, a fixed
    number; between the two, there is one for each `target_queued_seconds` of work. `num_gpus` and `num_cpus` are those of one
    replica, as Ray counts them; None is found out from what the cluster has. Delays and timeouts are in seconds.
    """

    address: str | None = setting(
        None,
        "the Ray cluster to join, such as auto or 10.0.0.5:6379 (default: one is started here, and ends with the server)",
        metavar="ADDRESS",
    )
    app: str = setting("img2img", "the Ray Serve application: the first server deploys it, others of that name share it")
    min_replicas: int = setting(1, "fewest replicas: processes with an engine each", metavar="N", least=1)
    max_replicas: int | None = setting(
        None, "most replicas (default: as many as the fewest, so that their number is fixed)", metavar="N", least=1
    )
    num_gpus: float | None = setting(
        None, "GPUs of one replica (default: one where the cluster has GPUs, else none)", metavar="N", least=0
    )
    num_cpus: float | None = setting(
        None,
        "cores of one replica (default: one beside a GPU; else this machine's, shared out among the most replicas)",
        metavar="N",
        least=0,
    )
    target_queued_seconds: float = setting(
        10.0, "seconds of queued work for each replica, by which their number is chosen", metavar="SECONDS", least=0.1
    )
    upscale_delay: float = setting(
        30.0, "how long there must be too much work before replicas are added", metavar="SECONDS", least=0
    )
    downscale_delay: float = setting(
        600.0, "how long there must be too little work before replicas are taken away", metavar="SECONDS", least=0
    )
    spread_after: float = setting(
        30.0,
        "a request goes to a replica that must load its model first, once those that have it are this much busier",
        metavar="SECONDS",
        least=0,
    )
    graceful_shutdown_timeout: float = setting(
        30.0, "time to finish for a replica that is taken away", metavar="SECONDS", least=0
    )

    def __post_init__(self) -> None:
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError(f"ray_max_replicas is {self.max_replicas}, ray_min_replicas {self.min_replicas}: most, and fewest")
        if self.address is not None and self.address.startswith("ray://"):
            raise ValueError("ray_address: ray:// is Ray's client, which knows no streams; give the cluster's own address")
        if not self.app:
            raise ValueError("ray_app is empty")

    @property
    def most_replicas(self) -> int:
        """The most replicas that there can be."""
        return self.min_replicas if self.max_replicas is None else self.max_replicas


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What `img2img serve` runs with.

    `models` is a folder of bundles, or one bundle. Port 0 takes a free one; `port_file` is written with the port once the
    server is SERVING. `grace` is how many seconds running requests get after SIGTERM. `execution` is how models are run.
    `cache_bytes` hold what was encoded of prompts and pictures, 0 for none; clients with tokens share them only if `share_caches`
    is set. `warm_up` is how many
    seconds each model is measured for before it is served. `trace` gets the device's timeline. `allow_unverified` serves
    bundles, too, whose verification failed. `tokens` is the file of those who may call (access/), None for everybody.
    `allow_insecure` lets the server listen beyond loopback without TLS. `watchdog` is how many seconds one call of a model may
    take before the engine counts as stuck. Raises ValueError for a setting that cannot work.
    """

    models: Path = setting(Path(), "a folder of bundles, or one bundle", metavar="DIR", required=True)
    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(50051, "port to listen on, 0 for a free one", metavar="PORT", least=0, most=65535)
    port_file: Path | None = setting(None, "write the port here once the server is ready", metavar="FILE")
    allow_insecure: bool = setting(False, "listen beyond loopback without TLS, where something else has it")
    accept_compression: bool = setting(
        False, "accept messages compressed with gzip or deflate; a small one can then take as much memory as the largest"
    )
    kserve: bool = setting(False, "also answer KServe v2, as Triton's clients speak it, on the same port")
    engine: Literal["local", "ray"] = setting(
        "local", "where models run: in this process, or as replicas of an application on a Ray cluster", choices=("local", "ray")
    )
    default_model: str | None = setting(
        None, "the model of requests that name none (default: the only one there is)", metavar="ID"
    )
    tokens: Path | None = setting(
        None, "who may call: a file that `img2img token` writes (default: everybody who reaches the port)", metavar="FILE"
    )
    grace: float = setting(30.0, "time to finish on SIGTERM", metavar="SECONDS", least=0)
    watchdog: float = setting(
        300.0,
        "longest that one call of a model may take before the server gives itself up; 0: for ever",
        metavar="SECONDS",
        least=0,
    )
    reader_timeout: float = setting(
        60.0,
        "longest that a client may leave a message of its answer unread, and a second more for each 64 KiB of it; 0: for ever",
        metavar="SECONDS",
        least=0,
    )
    warm_up: float = setting(10.0, "time to measure a model at start", metavar="SECONDS", least=0)
    cache_bytes: int = setting(256 * 2**20, "memory for encoded prompts and pictures, 0 for none", metavar="BYTES", least=0)
    share_caches: bool = setting(
        False,
        "share encoded prompts and images between clients with tokens; their timings then tell each other what others sent",
    )
    trace: Path | None = setting(None, "write the device's timeline here, to be opened in ui.perfetto.dev", metavar="FILE")
    allow_unverified: bool = setting(False, "also serve bundles that did not pass their export's verification")
    max_steps: int = setting(100, "largest num_inference_steps", metavar="N", least=1)
    max_image_count: int = setting(8, "most pictures of one request", metavar="N", least=1)
    limits: Limits = section(Limits, "the queue")
    image_limits: ImageLimits = section(ImageLimits, "pictures")
    codecs: CodecSettings = section(CodecSettings, "codecs")
    execution: Execution = section(Execution, "how models are run")
    residency: ModelSettings = section(ModelSettings, "models in memory")
    tls: TlsSettings = section(TlsSettings, "TLS", prefix="tls_")
    assets: AssetSettings = section(AssetSettings, "kept pictures")
    sources: SourceSettings = section(SourceSettings, "pictures from addresses")
    telemetry: TelemetrySettings = section(TelemetrySettings, "metrics, traces and logs")
    ray: RaySettings = section(RaySettings, "replicas on Ray (--engine ray)", prefix="ray_")

    def __post_init__(self) -> None:
        check(self)

    @property
    def max_message_bytes(self) -> int:
        """The largest message taken from the network: a source picture as a base64 URI and something beside it."""
        return 2 * self.image_limits.max_bytes + 2**20
