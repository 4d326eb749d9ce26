"""The server's configuration: every setting with its default and its help text, validated on construction."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from img2img_server.engine.scheduler import QueueLimits
from img2img_server.images import ImageLimits
from img2img_server.runtime.execution import Execution
from img2img_server.settings.setting import check, section, setting

DEFAULT_PROMPT = "A beautiful landscape with mountains and a lake at sunset"
DEFAULT_STRENGTH = 0.8
DEFAULT_STEPS = 25
DEFAULT_GUIDANCE = 7.5
DEFAULT_QUALITY = 90
MAX_GUIDANCE = 30.0
MAX_PROMPT = 4096
"""Characters. Text encoders read about 77 tokens; tokenizing longer texts would only delay the engine."""


PRELOAD_WORDS = ("default", "all", "none")
"""Values of `preload` other than ids."""


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Which models are loaded and downloaded. `memory` is in bytes, None for no bound; `preload` has ids, or one of
    PRELOAD_WORDS."""

    memory: int | None = setting(
        None,
        "memory for all models; models that are not in use are evicted (LRU) to stay below it (default: no limit)",
        metavar="BYTES",
        least=1,
        name="models_memory",
    )
    preload: tuple[str, ...] = setting(
        ("default",),
        "ids of models to load before serving, or default (the default model), all (as many as fit into memory) or none; "
        "other models are loaded on request",
        metavar="ID[,...]",
    )
    load_on_request: bool = setting(True, "load a model when the first request for it arrives")
    allow_downloads: bool = setting(
        False, "export and load models from Hugging Face repositories if a request names one that is not in the store"
    )
    download_repos: tuple[str, ...] = setting(
        (), "repositories that may be downloaded: patterns such as stabilityai/*", metavar="PATTERN[,...]"
    )

    def __post_init__(self) -> None:
        if self.allow_downloads and not self.download_repos:
            raise ValueError(
                "allow_downloads needs download_repos: the repositories that may be downloaded, such as stabilityai/*"
            )


@dataclass(frozen=True, slots=True)
class LoraFolder:
    """The LoRAs that requests may name. `cache` is in bytes; `slots` is the number of different LoRAs that share a call."""

    folder: Path | None = setting(
        None,
        "folder of LoRAs that requests may name: DIR/NAME.safetensors has the id NAME (default: requests cannot have LoRAs). "
        "Every model that takes LoRAs then also opens its LoRA graphs, which on a CPU takes about as much memory again",
        metavar="DIR",
        name="loras",
    )
    cache: int = setting(
        2**30, "memory for LoRAs that were read; the least recently used are evicted", metavar="BYTES", least=0, name="lora_cache"
    )
    slots: int = setting(
        8,
        "maximum number of different LoRAs in one call of a model; a larger batch is divided. Memory for them is taken when the "
        "first request with a LoRA arrives",
        metavar="N",
        least=1,
        most=64,
        name="lora_slots",
    )


@dataclass(frozen=True, slots=True)
class ImageAdapterFolder:
    """The image adapters (IP-Adapters) that requests may name. `cache` is in bytes."""

    folder: Path | None = setting(
        None,
        "folder of image adapters (IP-Adapters) that requests' image prompts may name: DIR/NAME.safetensors has the id NAME "
        "(default: requests cannot have image prompts)",
        metavar="DIR",
        name="image_adapters",
    )
    cache: int = setting(
        2**30,
        "memory for image adapters that were read; the least recently used are evicted",
        metavar="BYTES",
        least=0,
        name="image_adapter_cache",
    )


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """The TLS files, in PEM. They are reloaded when they change. With `client_ca`, clients need a certificate that it signed."""

    certificate: Path | None = setting(None, "certificate chain of the server, in PEM", metavar="FILE")
    key: Path | None = setting(None, "private key of the certificate, in PEM", metavar="FILE")
    client_ca: Path | None = setting(
        None, "accept only clients with a certificate that one of these authorities signed (mutual TLS), in PEM", metavar="FILE"
    )

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("tls_certificate and tls_key must be set together: set both or neither")
        if self.client_ca is not None and self.certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key")


@dataclass(frozen=True, slots=True)
class AssetSettings:
    """Asset storage. `url` is any URL that fsspec opens. `quota` is in bytes, and so is `client_quota`, that of one token's name
    (None: no bound). `max_age` is in seconds since an asset's last use."""

    url: str | None = setting(
        None,
        "folder or URL (s3://bucket/folder) to store assets in, none to disable assets (default: ~/.cache/img2img/assets)",
        name="assets",
        metavar="URL",
        is_path=lambda text: text != "none" and "://" not in text,
    )
    quota: int = setting(2**30, "maximum size of all stored assets", name="assets_quota", metavar="BYTES", least=1)
    client_quota: int | None = setting(
        None,
        "maximum size of the assets of one token's name (default: bounded by assets_quota only)",
        name="assets_client_quota",
        metavar="BYTES",
        least=1,
    )
    max_age: float = setting(
        24 * 3600.0, "delete an asset this long after its last use", name="assets_max_age", metavar="SECONDS", least=1
    )


@dataclass(frozen=True, slots=True)
class CodecSettings:
    """Processes that decode and encode images, None for the number of cores + 1, at most 9. `memory` bounds the bytes of images
    that are being received or decoded."""

    decoders: int | None = setting(
        None, "processes that decode images (default: cores + 1, at most 9)", metavar="N", least=1, name="decode_processes"
    )
    encoders: int | None = setting(
        None, "processes that encode images (default: cores + 1, at most 9)", metavar="N", least=1, name="encode_processes"
    )
    memory: int = setting(
        4 * 2**30,
        "memory for images that are being received or decoded; requests that exceed it are refused",
        metavar="BYTES",
        least=1,
        name="image_memory",
    )


@dataclass(frozen=True, slots=True)
class SourceSettings:
    """The URLs that `image.uri` may have, in addition to data: and asset:. `http_seconds` bounds one download."""

    allow_http: bool = setting(
        False, "fetch source images from http and https URLs on the public internet, never from private networks"
    )
    http_seconds: float = setting(10.0, "maximum duration of one fetch", metavar="SECONDS", least=0.1)
    file_root: Path | None = setting(None, "allow file: URLs below this folder", metavar="DIR")


@dataclass(frozen=True, slots=True)
class TelemetrySettings:
    """Metrics, traces and logs. Metrics are served over HTTP if `metrics_port` is set; 0 takes a free port."""

    metrics_port: int | None = setting(
        None,
        "serve Prometheus metrics over HTTP on this port; 0 takes a free one (default: no metrics)",
        metavar="PORT",
        least=0,
        most=65535,
    )
    metrics_host: str = setting("127.0.0.1", "address to serve metrics on; metrics need no token")
    otlp_endpoint: str | None = setting(
        None, "send OpenTelemetry traces to this collector, such as http://localhost:4317", metavar="URL"
    )
    log_format: Literal["text", "json"] = setting("text", "format of the log on standard error", choices=("text", "json"))
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "info",
        "lowest level that is logged; debug includes tracebacks of models that fail to load",
        choices=("debug", "info", "warning", "error"),
    )


@dataclass(frozen=True, slots=True)
class ProvenanceSettings:
    """The record of a result's origin in its file. `certificate` and `key` are set if and only if `mode` is "c2pa"."""

    mode: Literal["none", "text", "c2pa"] = setting(
        "text",
        "write into each image file how it was made: none, text (prompts, settings, seed and model, readable by anyone who has "
        "the file) or c2pa (text, and a signed C2PA manifest)",
        choices=("none", "text", "c2pa"),
        name="provenance",
    )
    certificate: Path | None = setting(
        None, "certificate chain that C2PA manifests are signed with, in PEM", metavar="FILE", name="c2pa_certificate"
    )
    key: Path | None = setting(None, "private key of that certificate, in PEM", metavar="FILE", name="c2pa_key")

    def __post_init__(self) -> None:
        signs = self.mode == "c2pa"
        if (self.certificate is not None) != signs or (self.key is not None) != signs:
            raise ValueError("provenance c2pa needs c2pa_certificate and c2pa_key, and no other value of provenance uses them")


@dataclass(frozen=True, slots=True)
class RaySettings:
    """Replicas for `engine` "ray": one Ray Serve application, which all servers of the same `app` share.

    `address` None starts a cluster on this machine, which ends with this server. `max_replicas` None is `min_replicas`, a fixed
    number; between the two there is one replica for each `target_queued_seconds` of work. `num_gpus` and `num_cpus` are per
    replica, as Ray counts them; None derives them from the cluster. Delays and timeouts are in seconds.
    """

    address: str | None = setting(
        None,
        "Ray cluster to join, such as auto or 10.0.0.5:6379 (default: start one on this machine, which ends with the server)",
        metavar="ADDRESS",
    )
    app: str = setting(
        "img2img", "name of the Ray Serve application: the first server deploys it, later ones of that name join it"
    )
    min_replicas: int = setting(1, "minimum number of replicas (processes with one engine each)", metavar="N", least=1)
    max_replicas: int | None = setting(
        None, "maximum number of replicas (default: the minimum, so that the number is fixed)", metavar="N", least=1
    )
    num_gpus: float | None = setting(
        None, "GPUs per replica (default: one if the cluster has GPUs, else none)", metavar="N", least=0
    )
    num_cpus: float | None = setting(
        None,
        "cores per replica (default: one with a GPU, else this machine's cores divided by the maximum number of replicas)",
        metavar="N",
        least=0,
    )
    target_queued_seconds: float = setting(
        10.0, "target of queued work per replica; the number of replicas follows it", metavar="SECONDS", least=0.1
    )
    upscale_delay: float = setting(30.0, "add replicas if the work exceeds the target for this long", metavar="SECONDS", least=0)
    downscale_delay: float = setting(
        600.0, "remove replicas if the remaining ones would be at most half loaded for this long", metavar="SECONDS", least=0
    )
    spread_after: float = setting(
        30.0,
        "send a request to a replica that must load its model only if the replicas that have the model are busier by this much",
        metavar="SECONDS",
        least=0,
    )
    graceful_shutdown_timeout: float = setting(
        30.0, "time to finish requests for a replica that is removed", metavar="SECONDS", least=0
    )

    def __post_init__(self) -> None:
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError(f"ray_max_replicas ({self.max_replicas}) is less than ray_min_replicas ({self.min_replicas})")
        if self.address is not None and self.address.startswith("ray://"):
            raise ValueError("ray_address: ray:// addresses (Ray Client) do not support streams; give the cluster's own address")
        if not self.app:
            raise ValueError("ray_app is empty")

    @property
    def most_replicas(self) -> int:
        """The maximum number of replicas."""
        return self.min_replicas if self.max_replicas is None else self.max_replicas


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The configuration of `img2img serve`.

    `models` is a folder of bundles, or one bundle. Port 0 takes a free one; `port_file` is written with the port once the
    server is SERVING. `grace`, `watchdog`, `reader_timeout` and `warm_up` are in seconds: the time for accepted requests after
    SIGTERM, the maximum duration of one model call, the maximum time that a client may leave a message unread, and the time to
    measure each model at start. `cache_bytes` bounds the cache of encoded prompts and images, which clients with tokens share
    only if `share_caches` is set. `tokens` is the file of tokens (access/), None for no authentication. `trace` is the file for
    the device's timeline. Raises ValueError for an invalid setting.
    """

    models: Path = setting(Path(), "folder of bundles, or one bundle", metavar="DIR", required=True)
    host: str = setting("127.0.0.1", "address to listen on; addresses other than loopback need TLS or allow_insecure")
    port: int = setting(50051, "port to listen on; 0 takes a free one", metavar="PORT", least=0, most=65535)
    port_file: Path | None = setting(None, "write the port to this file once the server is ready", metavar="FILE")
    allow_insecure: bool = setting(False, "allow plaintext on non-loopback addresses (TLS terminated upstream)")
    accept_compression: bool = setting(
        False, "accept messages compressed with gzip or deflate; a small message can then take as much memory as the largest"
    )
    kserve: bool = setting(False, "also serve the KServe v2 protocol, for Triton's clients, on the same port")
    http_port: int | None = setting(
        None,
        "also serve OpenAI's image API over HTTP on this port, with the same host, TLS and tokens; 0 takes a free one "
        "(default: no HTTP)",
        metavar="PORT",
        least=0,
        most=65535,
    )
    engine: Literal["local", "ray"] = setting(
        "local", "where models run: local (in this process) or ray (in replicas on a Ray cluster)", choices=("local", "ray")
    )
    default_model: str | None = setting(None, "model for requests that name none (default: the only model)", metavar="ID")
    tokens: Path | None = setting(
        None, "require a token from this file, which `img2img token` writes (default: no authentication)", metavar="FILE"
    )
    grace: float = setting(30.0, "time for accepted requests to finish after SIGTERM", metavar="SECONDS", least=0)
    watchdog: float = setting(
        300.0,
        "maximum duration of one model call before the server exits; 0 disables it",
        metavar="SECONDS",
        least=0,
    )
    reader_timeout: float = setting(
        60.0,
        "maximum time that a client may leave a message unread, plus one second for each 64 KiB of it; 0 disables it",
        metavar="SECONDS",
        least=0,
    )
    warm_up: float = setting(10.0, "maximum time to measure each model at start; 0 disables it", metavar="SECONDS", least=0)
    cache_bytes: int = setting(256 * 2**20, "cache for encoded prompts and images; 0 disables it", metavar="BYTES", least=0)
    share_caches: bool = setting(
        False,
        "share the cache between clients with tokens; timings then reveal whether another client sent the same input",
    )
    trace: Path | None = setting(None, "write a timeline of the device to this file, for ui.perfetto.dev", metavar="FILE")
    allow_unverified: bool = setting(False, "also serve bundles whose verification failed at export")
    max_steps: int = setting(100, "maximum num_inference_steps", metavar="N", least=1)
    max_image_count: int = setting(8, "maximum number of images of one request", metavar="N", least=1)
    max_reference_images: int = setting(
        4, "maximum number of reference_images of one request, beside its image", metavar="N", least=1
    )
    limits: QueueLimits = section(QueueLimits, "batching and queue")
    image_limits: ImageLimits = section(ImageLimits, "image limits")
    codecs: CodecSettings = section(CodecSettings, "codecs")
    execution: Execution = section(Execution, "how models are run")
    residency: ModelSettings = section(ModelSettings, "models in memory")
    loras: LoraFolder = section(LoraFolder, "LoRAs of requests")
    image_adapters: ImageAdapterFolder = section(ImageAdapterFolder, "image adapters of requests")
    tls: TlsSettings = section(TlsSettings, "TLS", prefix="tls_")
    assets: AssetSettings = section(AssetSettings, "assets")
    sources: SourceSettings = section(SourceSettings, "images from URLs")
    provenance: ProvenanceSettings = section(ProvenanceSettings, "provenance of images")
    telemetry: TelemetrySettings = section(TelemetrySettings, "metrics, traces and logs")
    ray: RaySettings = section(RaySettings, "replicas on Ray (--engine ray)", prefix="ray_")

    def __post_init__(self) -> None:
        check(self)

    @property
    def max_message_bytes(self) -> int:
        """The largest message that is accepted: a source image as a base64 URI, and 1 MiB for the rest."""
        return 2 * self.image_limits.max_bytes + 2**20
