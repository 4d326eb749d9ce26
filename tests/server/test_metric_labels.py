"""Metrics without a server: bounded labels, and gauges over the parts of a server."""

import sys
import threading
import types

import pytest
from fakes import FakePipeline
from img2img_server.assets.store import AssetStore
from img2img_server.codecs.pool import Codecs, ImageMemory
from img2img_server.config import AssetSettings
from img2img_server.engine.cache import Cache
from img2img_server.engine.engine import Engine
from img2img_server.engine.interface import Span
from img2img_server.support.call import Call
from img2img_server.telemetry.metrics import ASKED, COUNTED, Gauges, Metrics
from img2img_server.telemetry.request_traces import Outcome, Record
from running import store


def collected(cache: Cache | None = None) -> dict[str, float]:
    """The samples of a registry with the gauges of an idle engine and of `cache`, by name."""
    metrics, codecs = Metrics(), Codecs(1, 1, ImageMemory(1000))
    metrics.registry.register(Gauges(Engine({}), store(m=FakePipeline()), cache, AssetStore(AssetSettings()), codecs))
    return {sample.name: sample.value for family in metrics.registry.collect() for sample in family.samples}


def test_cache_and_process_metrics_are_reported() -> None:
    cache = Cache(1000)
    cache.put("a", 1, 600)
    cache.put("b", 2, 600)
    cache.get("b")
    cache.get("nope")
    cache.get("nope")
    samples = collected(cache)
    assert (samples["img2img_cache_hits_total"], samples["img2img_cache_misses_total"]) == (1, 2)
    assert (samples["img2img_cache_evictions_total"], samples["img2img_cache_entries"]) == (1, 1)
    assert (samples["img2img_cache_bytes"], samples["img2img_cache_budget_bytes"]) == (600, 1000)
    assert samples["process_resident_memory_bytes"] > 2**20


def test_unloaded_model_reports_no_memory() -> None:
    """Its last size is still remembered for the next load."""
    models = store(m=FakePipeline())
    metrics, codecs = Metrics(), Codecs(1, 1, ImageMemory(1000))
    metrics.registry.register(Gauges(Engine({}), models, None, AssetStore(AssetSettings()), codecs))
    models.change("m", memory=1000)
    assert metrics.registry.get_sample_value("img2img_model_memory_bytes", {"model": "m"}) == 1000
    models.change("m", pipeline=None)
    assert models.get("m").memory == 1000
    assert metrics.registry.get_sample_value("img2img_model_memory_bytes", {"model": "m"}) == 0
    assert labels_of(metrics, "img2img_model_info", "model") == set()


def test_gpu_memory_is_reported_only_once_torch_uses_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    used = False
    cuda = types.SimpleNamespace(
        is_initialized=lambda: used, device_count=lambda: 1, mem_get_info=lambda device: (3 * 2**30, 8 * 2**30)
    )
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    assert "img2img_device_memory_free_bytes" not in collected(), "to ask would make a context on the GPU"
    used = True
    assert collected()["img2img_device_memory_free_bytes"] == 3 * 2**30
    assert collected()["img2img_device_memory_total_bytes"] == 8 * 2**30


def record(method: str = "/img2img.v1.ModelService/ListModels", host: str = "127.0.0.1", client: str = "127.0.0.1") -> Record:
    return Record(Call(method, "r", client=host), 0.0, Outcome(client=client))


def labels_of(metrics: Metrics, name: str, label: str) -> set[str]:
    families = metrics.registry.collect()
    return {sample.labels[label] for family in families for sample in family.samples if sample.name == name}


def test_unknown_methods_share_one_label() -> None:
    metrics = Metrics()
    for number in range(100):
        metrics.began(record(f"/made.up/Method{number}"))
        metrics.ended(record(f"/made.up/Method{number}"), 1.0)
    metrics.ended(record("/grpc.health.v1.Health/Check"), 1.0)
    metrics.ended(record("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"), 1.0)
    methods = {"other", "Health/Check", "ServerReflection/ServerReflectionInfo"}
    assert labels_of(metrics, "img2img_requests_total", "method") == methods
    assert labels_of(metrics, "img2img_calls_in_progress", "method") <= methods


def test_client_label_has_token_names_but_no_addresses() -> None:
    metrics = Metrics()
    for number in range(100):
        metrics.ended(record(host=f"10.0.0.{number}", client=f"10.0.0.{number}"), 1.0)  # no token is needed
    metrics.ended(record(host="10.0.0.1", client="studio"), 1.0)
    metrics.ended(record(host="10.0.0.2", client=""), 1.0)  # not admitted
    assert labels_of(metrics, "img2img_requests_total", "client") == {"", "studio"}


def test_number_of_client_labels_is_bounded() -> None:
    metrics = Metrics()
    for number in range(1000):
        metrics.ended(record(client=f"token-{number}"), 1.0)
    names = labels_of(metrics, "img2img_requests_total", "client")
    assert len(names) <= 201
    assert {"token-0", "other"} <= names


def test_names_follow_prometheus_conventions() -> None:
    for about in (*COUNTED, *ASKED):
        assert about.name.startswith("img2img_")
        assert about.name.endswith("_total") == (about.kind == "counter"), about.name
        assert about.help
        assert not about.help.endswith(".")


def test_hanging_scrape_does_not_block_counting() -> None:
    """A scrape may block on the engine's lock; counting must not."""
    asked, leave = threading.Event(), threading.Event()

    class Slow:
        def describe(self) -> tuple[()]:
            return ()

        def collect(self) -> tuple[()]:
            asked.set()
            leave.wait(60)
            return ()

    metrics = Metrics()
    metrics.registry.register(Slow())

    def count() -> None:
        metrics.span(Span("denoise", "m", 1, 2, 0.0, 0.1))
        metrics.ended(record(), 1.0)

    scraping = threading.Thread(target=lambda: list(metrics.registry.collect()))
    scraping.start()
    try:
        assert asked.wait(60)
        counting = threading.Thread(target=count)
        counting.start()
        counting.join(60)
        assert not counting.is_alive()
    finally:
        leave.set()
        scraping.join(60)
