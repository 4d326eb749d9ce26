"""Load balancing and gRPC's own retries: the service config of a channel to several servers.

gRPC uses the servers round-robin and skips servers that are not healthy, such as one that is draining. It retries a call that
ends UNAVAILABLE before any response once, immediately, on the next server; `retry.py` does all other retries, with back-off.
https://github.com/grpc/grpc/blob/master/doc/service_config.md
"""

import json

from img2img_client.options import MAX_MESSAGE_BYTES
from img2img_client.retry import RetryPolicy

TRIES = 2
"""Attempts by gRPC per attempt of ours, for the procedures it retries."""

_IMMEDIATE_RETRY = {
    "maxAttempts": TRIES,
    "initialBackoff": "0.01s",
    "maxBackoff": "0.01s",
    "backoffMultiplier": 1,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
_RETRIED = (
    ("ImageToImageService", "Transform"),
    ("ImageToImageService", "TransformStream"),
    ("ModelService", "ListModels"),
    ("ModelService", "GetModel"),
    ("ModelService", "ListLoras"),
)
"""Procedures that may run twice and send one message. Not LoadModel (takes minutes), not uploads (the file is read again)."""

OPTIONS = (
    # gRPC buffers a call's message for retries, by default up to 256 KiB, which is less than an image.
    ("grpc.per_rpc_retry_buffer_size", MAX_MESSAGE_BYTES),
    # Detects a machine that is gone without closing its connections. Our servers allow a ping every 10 seconds.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Minimum time between DNS lookups after connections end. gRPC's default is 30 seconds.
    ("grpc.dns_min_time_between_resolutions_ms", 2_000),
)
"""Channel arguments for several servers."""


def tries_of(procedure: str, policy: RetryPolicy | None) -> int:
    """How many attempts gRPC may have made for a call that ended UNAVAILABLE, on a channel with `service_config(policy)`."""
    return TRIES if _grpc_retries(policy) and tuple(procedure.split("/")) in _RETRIED else 1


def service_config(policy: RetryPolicy | None) -> str:
    """The service config (JSON) of a channel to several servers, with gRPC's retries if the policy allows as many attempts."""
    config: dict[str, object] = {
        "loadBalancingConfig": [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": ""},  # the server as a whole
    }
    if _grpc_retries(policy):
        names = [{"service": f"img2img.v1.{service}", "method": method} for service, method in _RETRIED]
        config["methodConfig"] = [{"name": names, "retryPolicy": _IMMEDIATE_RETRY}]
    return json.dumps(config)


def _grpc_retries(policy: RetryPolicy | None) -> bool:
    return policy is not None and policy.max_attempts >= TRIES
