"""Clients with tokens learn nothing about each other from caches: neither from encoded prompts and images nor from assets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from fakes import FakePipeline, make_request
from granting import bearing, grant
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img_server.bundle.manifest import read_manifest
from img2img_server.engine.cache import Cache
from img2img_server.engine.request import run_alone
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from messages import request
from PIL import Image
from running import running, store


def scopes_of(path: Path | None, *callers: tuple[tuple[str, str], ...], **settings: Any) -> list[str]:
    """The scopes in which requests of these callers, all with one prompt and image, are encoded."""
    pipeline = FakePipeline()
    with (
        running(lambda: store(m=pipeline), tokens=path, **settings) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        for metadata in callers:
            ImageToImageServiceStub(channel).Transform(request(), metadata=metadata, timeout=60)
    return [state.request.cache_scope for state in pipeline.prepared]


def test_each_token_has_its_own_scope_unless_caches_are_shared(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    alice, bob = bearing(grant(path, "alice")), bearing(grant(path, "bob"))
    first, second, again = scopes_of(path, alice, bob, alice)
    assert first == again != second
    assert "" not in (first, second)
    assert scopes_of(path, alice, bob, share_caches=True) == ["", ""]


def test_without_tokens_there_is_one_scope() -> None:
    assert scopes_of(None, (), ()) == ["", ""]


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_cached_encodings_are_not_shared_between_scopes(bundle: Callable[[str], Path], model: str) -> None:
    """For its client, the first request of a scope is the same, independent of other scopes' requests."""
    cache = Cache(2**24)
    pipeline = load_pipeline(bundle(model), read_manifest(bundle(model)), Execution("cpu"), cache=cache)
    image = Image.new("RGB", (64, 64), "teal")

    def hits_and_misses(scope: str) -> tuple[int, int]:
        before = cache.stats
        asked = make_request(
            image=image, image_digest=b"1", prompt="a lake", negative_prompt="fog", num_inference_steps=2, cache_scope=scope
        )
        run_alone(pipeline, asked)
        return cache.stats.hits - before.hits, cache.stats.misses - before.misses

    assert hits_and_misses("alice") == (0, 3), "two texts and an image"
    assert hits_and_misses("bob") == (0, 3)
    assert hits_and_misses("alice") == (3, 0)


def test_batched_requests_of_two_scopes_do_not_share_encodings(bundle: Callable[[str], Path]) -> None:
    cache = Cache(2**24)
    pipeline = load_pipeline(bundle("sd1"), read_manifest(bundle("sd1")), Execution("cpu"), cache=cache)
    values: dict[str, Any] = {"image": Image.new("RGB", (64, 64), "teal"), "image_digest": b"1", "prompt": "a lake"}
    requests = [make_request(**values, negative_prompt="fog", cache_scope=scope) for scope in ("alice", "bob", "bob")]
    for state in pipeline.prepare(requests):
        pipeline.release(state)
    assert (cache.stats.hits, cache.stats.misses) == (0, 6)
