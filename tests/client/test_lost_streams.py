"""A started stream whose server is lost continues on another server; its caller sees one sequence of events."""

from collections.abc import Iterator
from typing import Any

import pytest
from blocking import Blocking
from fake_image_service import FakeServer, FakeService, events
from fake_statuses import error_info, queue_full, rich_status, unavailable
from google.rpc import code_pb2  # type: ignore[import-untyped, unused-ignore]
from img2img.v1 import image_to_image_pb2 as messages
from img2img_client import Client, Completed, Img2ImgError, Progress, Queued, Started, Unavailable


def test_retried_stream_resumes_without_repeating_events(patient: Client, service: FakeService) -> None:
    """Attempts are lost before different events, some of them earlier than the attempt before."""
    service.script = events(3, 4, steps=6)
    life = service.script
    lost_before = iter([4, 3, 1, len(life) - 1])

    class Lossy(list[messages.TransformStreamResponse]):
        def __iter__(self) -> Iterator[messages.TransformStreamResponse]:
            service.fail_before = next(lost_before)
            return super().__iter__()

    service.script = Lossy(life)
    service.fail_before = None
    service.failures = [unavailable(), queue_full(0.001), unavailable()]
    seen = list(patient.transform_stream(b"file", seed=-1, image_count=2))
    assert [type(event) for event in seen] == [Queued, Started, *[Progress] * 6, Completed]
    assert [event.step for event in seen if isinstance(event, Progress)] == [1, 2, 3, 4, 5, 6]
    assert [request.seed for request in service.requests] == [-1, 7, 7, 7], "the seed of the Started event"
    assert {request.image_count for request in service.requests} == {2}


def test_started_stream_fails_after_the_last_attempt(
    patient: Client, service: FakeService, retry_log: list[tuple[int, str, float]]
) -> None:
    service.fail_before = 3
    service.failure = unavailable()
    stream = patient.transform_stream(b"file")
    assert [type(next(stream)) for _ in range(3)] == [Queued, Started, Progress]
    with pytest.raises(Unavailable):
        next(stream)
    assert len(service.requests) == 4
    assert [attempt for attempt, _, _ in retry_log] == [1, 2, 3]


@pytest.mark.parametrize("kind", [Client, Blocking])
def test_started_stream_is_not_retried_without_a_policy(kind: Any, server: FakeServer) -> None:
    server.service.fail_before = 2
    server.service.failures = [unavailable()]
    with kind(server.target, timeout=120, retries=None) as once:
        stream = once.transform_stream(b"file")
        assert [type(next(stream)) for _ in range(2)] == [Queued, Started]
        with pytest.raises(Unavailable):
            next(stream)
    assert len(server.service.requests) == 1


def test_started_stream_is_not_retried_after_a_permanent_error(patient: Client, service: FakeService) -> None:
    service.fail_before = 2
    service.failures = [rich_status(code_pb2.INTERNAL, "failed", error_info("MODEL_FAILED"))]
    with pytest.raises(Img2ImgError) as caught:
        list(patient.transform_stream(b"file"))
    assert (caught.value.status, len(service.requests)) == ("INTERNAL", 1)
