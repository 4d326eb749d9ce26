"""How calls are spread over several servers, and what gRPC itself tries again: the channel's service config.

gRPC takes the servers in turn (round_robin) and leaves out those whose health says that they do not serve, such as one that
drains. What ended UNAVAILABLE before any answer began, it tries once more, at the next server and at once: ours, in `retry.py`,
is everything else, with its waits. https://github.com/grpc/grpc/blob/master/doc/service_config.md
"""

import json

from img2img_client.options import MAX_MESSAGE_BYTES
from img2img_client.retry import RetryPolicy

TRIES = 2
"""Of gRPC's for each attempt of ours, where it tries again."""

_AT_ONCE = {
    "maxAttempts": TRIES,
    "initialBackoff": "0.01s",
    "maxBackoff": "0.01s",
    "backoffMultiplier": 1,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
_TRIED_AGAIN = (
    ("ImageToImageService", "Transform"),
    ("ImageToImageService", "TransformStream"),
    ("ModelService", "ListModels"),
    ("ModelService", "GetModel"),
)
"""What may run twice and is sent as one message. Not LoadModel, which takes minutes; not uploads, whose file is read anew."""

OPTIONS = (
    # gRPC keeps a call's message as long as it may have to send it again, by default up to 256 KiB: fewer than an image has.
    ("grpc.per_rpc_retry_buffer_size", MAX_MESSAGE_BYTES),
    # A machine that has gone without a word is noticed, and its calls fail. Servers of ours allow a ping each 10 seconds.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A name is looked up again when a connection ends, but not more often than this. gRPC's default is 30 seconds.
    ("grpc.dns_min_time_between_resolutions_ms", 2_000),
)
"""Of a channel to several servers."""


def tries_of(procedure: str, policy: RetryPolicy | None) -> int:
    """How often gRPC may have tried a call that ended UNAVAILABLE, on a channel with `service_config(policy)`."""
    return TRIES if _grpc_retries(policy) and tuple(procedure.split("/")) in _TRIED_AGAIN else 1


def service_config(policy: RetryPolicy | None) -> str:
    """The service config of a channel to several servers, as JSON. Without gRPC's retries where the policy has no room for
    them."""
    config: dict[str, object] = {
        "loadBalancingConfig": [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": ""},  # the server as a whole
    }
    if _grpc_retries(policy):
        names = [{"service": f"img2img.v1.{service}", "method": method} for service, method in _TRIED_AGAIN]
        config["methodConfig"] = [{"name": names, "retryPolicy": _AT_ONCE}]
    return json.dumps(config)


def _grpc_retries(policy: RetryPolicy | None) -> bool:
    return policy is not None and policy.max_attempts >= TRIES
