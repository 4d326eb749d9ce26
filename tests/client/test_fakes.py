"""The fake server does not deadlock when health watches end while health changes."""

import itertools
import threading

import grpc
import pytest
from fake_image_service import PATIENCE, FakeServer
from img2img_client.requests import HEALTH_REQUEST, HEALTH_WATCH


@pytest.mark.timeout(120)
def test_health_changes_while_watches_begin_and_end(server: FakeServer) -> None:
    over = threading.Event()

    def watch() -> None:
        with grpc.insecure_channel(server.target) as channel:
            method: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(HEALTH_WATCH)
            for _ in range(50):
                call = method(HEALTH_REQUEST, timeout=PATIENCE)
                next(call)
                call.cancel()

    def change() -> None:
        for number in itertools.takewhile(lambda _: not over.is_set(), itertools.count()):
            server.set_serving(number % 2 == 0)

    watchers = [threading.Thread(target=watch, daemon=True) for _ in range(3)]
    changer = threading.Thread(target=change, daemon=True)
    for thread in (*watchers, changer):
        thread.start()
    for thread in watchers:
        thread.join(2 * PATIENCE)
    over.set()
    changer.join(PATIENCE)
    assert not any(thread.is_alive() for thread in (*watchers, changer))
