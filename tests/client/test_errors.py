"""Every status maps to its error class, with the fields of its details."""

import pytest
from fake_image_service import MAX_REQUEST_BYTES, FakeService
from fake_statuses import error_info, queue_full, rich_status, wrong_field
from google.rpc import code_pb2  # type: ignore[import-untyped, unused-ignore]
from img2img_client import (
    AssetNotFound,
    Cancelled,
    Client,
    Damaged,
    DeadlineExceeded,
    Img2ImgError,
    InvalidRequest,
    ModelNotFound,
    ModelUnavailable,
    NotSupported,
    Overloaded,
    PermissionDenied,
    ServerFailed,
    Unauthenticated,
    Unavailable,
)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("status", "reason", "kind"),
    [
        ("INVALID_ARGUMENT", "INVALID_FIELD", InvalidRequest),
        ("NOT_FOUND", "MODEL_NOT_FOUND", ModelNotFound),
        ("FAILED_PRECONDITION", "MODEL_UNAVAILABLE", ModelUnavailable),
        ("UNIMPLEMENTED", "NOT_SUPPORTED", NotSupported),
        ("RESOURCE_EXHAUSTED", "QUEUE_FULL", Overloaded),
        ("DEADLINE_EXCEEDED", "DEADLINE_EXPIRED", DeadlineExceeded),
        ("CANCELLED", "CANCELLED", Cancelled),
        ("UNAVAILABLE", "SHUTTING_DOWN", Unavailable),
        ("INTERNAL", "MODEL_FAILED", ServerFailed),
        ("NOT_FOUND", "ASSET_NOT_FOUND", AssetNotFound),
        ("NOT_FOUND", "NEW", ModelNotFound),
        ("UNAUTHENTICATED", "UNAUTHENTICATED", Unauthenticated),
        ("PERMISSION_DENIED", "PERMISSION_DENIED", PermissionDenied),
        ("UNKNOWN", "NEW", ServerFailed),
        ("DATA_LOSS", "NEW", Damaged),
        ("ABORTED", "NEW", Img2ImgError),
    ],
)
def test_each_status_has_its_error(
    client: Client, service: FakeService, status: str, reason: str, kind: type[Img2ImgError], streamed: bool
) -> None:
    service.failure = rich_status(code_pb2.Code.Value(status), "in words", error_info(reason))
    with pytest.raises(Img2ImgError) as caught:
        list(client.transform_stream(b"file")) if streamed else client.transform(b"file")
    error = caught.value
    assert type(error) is kind
    assert (error.message, str(error), error.status, error.reason) == ("in words", "in words", status, reason)
    assert (error.fields, error.retry_after, error.estimate) == ((), None, None)


def test_an_error_has_the_name_of_its_call(client: Client, service: FakeService) -> None:
    service.failure = rich_status(code_pb2.INTERNAL, "failed", error_info("MODEL_FAILED", request_id="abc"))
    with pytest.raises(Img2ImgError) as rich:
        client.models()
    plain = rich_status(code_pb2.INTERNAL, "failed")
    service.failure = plain._replace(trailing_metadata=(("x-request-id", "def"),))  # type: ignore[attr-defined]
    with pytest.raises(Img2ImgError) as trailing:
        list(client.transform_stream(b"file"))
    service.failure = rich_status(code_pb2.INTERNAL, "failed")
    with pytest.raises(Img2ImgError) as nameless:
        client.transform(b"file")
    assert [caught.value.request_id for caught in (rich, trailing, nameless)] == ["abc", "def", ""]


def test_wrong_fields_are_named(client: Client, service: FakeService) -> None:
    service.failure = wrong_field("strength", "must be above 0 and at most 1")
    with pytest.raises(InvalidRequest) as caught:
        client.transform(b"file", strength=2)
    assert caught.value.fields == (("strength", "must be above 0 and at most 1"),)


def test_overloaded_error_has_the_retry_delay(client: Client, service: FakeService) -> None:
    service.failure = queue_full(2.5)
    with pytest.raises(Overloaded) as caught:
        client.transform(b"file")
    assert caught.value.retry_after == 2.5


def test_deadline_unmeetable_error_has_the_estimate(client: Client, service: FakeService) -> None:
    info = error_info("DEADLINE_UNMEETABLE", estimate_seconds="12.500")
    service.failure = rich_status(code_pb2.DEADLINE_EXCEEDED, "it would take about 12.5 s", info)
    with pytest.raises(DeadlineExceeded, match=r"12\.5 s") as caught:
        client.transform(b"file")
    assert (caught.value.reason, caught.value.estimate) == ("DEADLINE_UNMEETABLE", 12.5)


def test_a_message_above_a_size_limit_is_not_overload(client: Client, service: FakeService) -> None:
    with pytest.raises(Img2ImgError, match="larger than max") as caught:
        client.transform(bytes(MAX_REQUEST_BYTES + 1))
    assert type(caught.value) is InvalidRequest
    assert caught.value.status == "RESOURCE_EXHAUSTED"


def test_error_reasons_of_other_domains_are_ignored(client: Client, service: FakeService) -> None:
    service.failure = rich_status(code_pb2.UNAVAILABLE, "a proxy", error_info("QUEUE_FULL", domain="example.org"))
    with pytest.raises(Unavailable) as caught:
        client.models()
    assert caught.value.reason == ""


def test_error_details_that_contradict_the_status_are_ignored(client: Client, service: FakeService) -> None:
    plain = rich_status(code_pb2.UNAVAILABLE, "outside")
    contradicting = rich_status(code_pb2.INTERNAL, "inside", error_info("MODEL_FAILED"))
    service.failure = plain._replace(trailing_metadata=contradicting.trailing_metadata)  # type: ignore[attr-defined]
    with pytest.raises(Unavailable, match="outside") as caught:
        client.transform(b"file")
    assert caught.value.reason == ""
