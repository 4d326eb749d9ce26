"""Every metric, label and label value in the dashboard and the alerts is served by a real server."""

import json
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from conftest import REPOSITORY
from fakes import FakePipeline
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img_server import errors
from img2img_server.config import TelemetrySettings
from img2img_server.engine.cache import Cache
from img2img_server.telemetry import metrics
from img2img_server.telemetry.metrics import STATES
from messages import failure, request
from running import running, store
from scraping import Samples, settled

DASHBOARD: dict[str, Any] = json.loads((REPOSITORY / "dashboards" / "img2img.json").read_text(encoding="utf-8"))
ALERTS: dict[str, Any] = yaml.safe_load((REPOSITORY / "dashboards" / "alerts.yaml").read_text(encoding="utf-8"))
RULES: list[dict[str, Any]] = [rule for group in ALERTS["groups"] for rule in group["rules"]]
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES: dict[str, dict[str, Any]] = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
QUERIES: list[tuple[str, str]] = [
    *((panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]),
    *((rule["alert"], rule["expr"]) for rule in RULES),
]
LISTS = {name: variable["definition"] for name, variable in VARIABLES.items() if variable["type"] == "query"}

PROMETHEUS_OWN = {"instance", "job"}
"""Labels that Prometheus adds to all that it scrapes."""
WORDS = {"sum", "max", "rate", "increase", "histogram_quantile", "absent", "by", "and", "on"}
"""Words of PromQL that the queries use."""


@pytest.fixture(scope="module")
def samples() -> Samples:
    """The metrics of a server after some work, and those of a GPU."""
    cuda = types.SimpleNamespace(is_initialized=lambda: True, device_count=lambda: 1, mem_get_info=lambda device: (1, 2))
    telemetry = TelemetrySettings(metrics_port=0)
    with running(lambda: store(m=FakePipeline()), telemetry=telemetry, cache=Cache(1000)) as server:
        with grpc.insecure_channel(f"localhost:{server.port}") as channel:
            stub = ImageToImageServiceStub(channel)
            stub.Transform(request())
            failure(lambda: stub.Transform(request(strength=2.0)))
        port = server.server.metrics_port
        assert port
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
            found = settled(port)
    return found


def asked(query: str) -> Iterator[tuple[str, set[str], dict[str, tuple[str, str]]]]:
    """For each metric in a query: its name, its labels, and its matchers (label, operator, value)."""
    plain = re.sub(r"\{[^}]*\}|\[[^]]*\]", "", query)
    grouped = {label.strip() for labels in re.findall(r"\b(?:by|on) \(([^)]*)\)", query) for label in labels.split(",")}
    names = set(re.findall(r"[a-z_][a-z0-9_]*", re.sub(r"\b(?:by|on) \([^)]*\)", "", plain))) - WORDS
    for name in names:
        compared: dict[str, tuple[str, str]] = {}
        for matchers in re.findall(rf"\b{name}\{{([^}}]*)\}}", query):
            for label, how, value in re.findall(r'(\w+)(=~|!=|!~|=)"([^"]*)"', matchers):
                compared[label] = how, value
            assert re.sub(r'\w+(=~|!=|!~|=)"[^"]*"(, )?', "", matchers) == "", f"not understood: {matchers}"
        yield name, grouped, compared


@pytest.mark.parametrize(("where", "query"), QUERIES, ids=[where for where, _ in QUERIES])
def test_every_query_uses_existing_metrics_and_labels(samples: Samples, where: str, query: str) -> None:
    found = list(asked(query))
    assert found
    there: set[str] = set()
    for name, _, compared in found:
        assert name in samples, f"there is no metric {name}"
        labels = {label for has, _ in samples[name] for label in has}
        assert set(compared) <= labels | PROMETHEUS_OWN, name
        there |= labels
    for _, grouped, _ in found:
        assert grouped <= there | PROMETHEUS_OWN


@pytest.mark.parametrize(("where", "query"), QUERIES, ids=[where for where, _ in QUERIES])
def test_every_query_compares_labels_with_possible_values(where: str, query: str) -> None:
    reasons = {kind.reason for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.ServerError)}
    possible = {
        "status": {code.name for code in grpc.StatusCode},
        "reason": reasons | {""},
        "state": set(STATES),
        "stage": {"queue", "encode", "denoise", "decode", "total", "prepare", "advance", "preview", "finish"},
    }
    for _, _, compared in asked(query):
        for label, (how, value) in compared.items():
            if label in possible:
                assert set(value.split("|") if "~" in how else [value]) <= possible[label], value
            elif label == "method":
                assert any(re.fullmatch(value, method) for method in metrics._methods().values())
            else:
                assert value == f"${label}", "what this may be is not known"


def test_query_parser_finds_metrics_labels_and_matchers() -> None:
    """The reader above finds every part of a query, so that no part remains unchecked."""
    query = 'sum by (le, model) (rate(a_bucket{x=~"b|c", y!=""}[5m])) / max(b_total) > 0.5 and on (instance) c_info'
    compared = {"x": ("=~", "b|c"), "y": ("!=", "")}
    grouped = {"le", "model", "instance"}
    found = {name: (labels, matchers) for name, labels, matchers in asked(query)}
    assert found == {"a_bucket": (grouped, compared), "b_total": (grouped, {}), "c_info": (grouped, {})}


def test_dashboard_variables_list_existing_labels(samples: Samples) -> None:
    assert set(LISTS) == {"instance", "model"}
    for name, definition in LISTS.items():
        match = re.fullmatch(r"label_values\((\w+)(?:\{[^}]*\})?, (\w+)\)", definition)
        assert match
        assert match[2] == name
        assert name in PROMETHEUS_OWN | {label for has, _ in samples[match[1]] for label in has}


def test_panels_fit_the_grid_and_use_the_datasource_variable() -> None:
    assert VARIABLES["datasource"]["type"] == "datasource"
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, f"{panel['title']} lies over another"
        taken |= cells
    for panel in PANELS:
        assert panel["type"] in ("timeseries", "stat", "table")
        assert panel["title"]
        assert panel["description"]
        for query in (panel, *panel["targets"]):
            assert query["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        references = {name for target in panel["targets"] for name in re.findall(r"\$(\w+)", target["expr"])}
        assert references <= set(VARIABLES) | {"__rate_interval"}
        labels = {label for target in panel["targets"] for label in re.findall(r"{{(\w+)}}", target["legendFormat"])}
        described = {label for about in (*metrics.COUNTED,) for label in about.labels}
        assert labels <= described | PROMETHEUS_OWN | {"state", "device"}


def test_every_metric_is_used_by_a_query() -> None:
    """A metric without a query is not worth counting."""
    from img2img_server.telemetry.metrics import ASKED

    queries = " ".join((*(query for _, query in QUERIES), *LISTS.values()))
    unseen = {about.name for about in (*metrics.COUNTED, *ASKED) if not re.search(rf"\b{about.name}(_sum|_bucket)?\b", queries)}
    assert unseen == {"img2img_cache_evictions_total", "img2img_cache_entries", "img2img_assets"}, "counts, for whoever digs"


def test_alerts_have_a_description_and_actions() -> None:
    known = set(re.findall(r"--[a-z-]+", help_of("serve") + help_of("inspect")))
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["alert"].startswith("Img2Img")
        assert re.fullmatch(r"\d+m", rule.get("for", "1m"))
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert set(re.findall(r"--[a-z-]+", rule["annotations"]["description"])) <= known, "flags that there are"
        used = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        kept = {label for _, grouped, compared in asked(rule["expr"]) for label in grouped}
        if " by " in rule["expr"]:
            assert used <= kept, "what is not summed by is lost"


def help_of(command: str) -> str:
    program = str(Path(sys.executable).parent / "img2img")
    return subprocess.run([program, command, "--help"], capture_output=True, text=True, timeout=60, check=True).stdout
