"""A server's metrics, parsed with Prometheus' own parser."""

import time
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

Samples = dict[str, list[tuple[dict[str, str], float]]]


def fetch(port: int) -> str:
    """The body of /metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=120) as response:
        text: str = response.read().decode()
    return text


def scrape(port: int) -> Samples:
    """Every sample by its name, such as "img2img_batch_rows_bucket", with its labels."""
    found: Samples = {}
    for family in text_string_to_metric_families(fetch(port)):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def settled(port: int) -> Samples:
    """The samples once no call is in progress: a caller gets its error before the server has counted it."""
    end = time.monotonic() + 60
    while value(samples := scrape(port), "img2img_calls_in_progress"):
        assert time.monotonic() < end, "a call never ends"
        time.sleep(0.01)
    return samples


def value(samples: Samples, name: str, **labels: str) -> float:
    """The sum of the samples of `name` that have these labels, 0 if there are none."""
    return sum(value for has, value in samples.get(name, ()) if labels.items() <= has.items())
