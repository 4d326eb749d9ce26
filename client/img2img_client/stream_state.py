"""The state of a stream: the events already delivered, so that a retry continues where the connection was lost.

`Started` has the seed of the first image, which determines the others: a retry with this seed generates the same images on any
server. No event is delivered twice.
"""

from img2img.v1 import image_to_image_pb2 as messages

from img2img_client.errors import Img2ImgError, ServerFailed
from img2img_client.values import Progress, Queued, Started, TransformEvent


class StreamState:
    """The state of one transform across attempts. `request` is the request of the next attempt.

    `begun`: the current attempt has received a response.
    """

    def __init__(self, request: messages.TransformRequest) -> None:
        self.request = messages.TransformStreamRequest(request=request)
        self.begun = False
        self._started: Started | None = None
        self._step = 0
        self._again = False

    def accept(self, event: TransformEvent) -> TransformEvent | None:
        """The event if it is new to the caller, else None: after Started, a retry's Queued and repeated steps are dropped."""
        if self._again and self._is_known(event):
            return None
        if isinstance(event, Started):
            self._started = event
            self.request.request.seed = event.seed
        if isinstance(event, Progress):
            self._step = event.step
        return event

    def lost(self) -> bool:
        """Records that the attempt failed. Returns whether it had received a response."""
        begun, self.begun, self._again = self.begun, False, True
        return begun

    def _is_known(self, event: TransformEvent) -> bool:
        if isinstance(event, Progress):
            return event.step <= self._step
        return self._started is not None and isinstance(event, Queued | Started)


def ended_without_result(request_id: str) -> Img2ImgError:
    """The error of a stream that ended with status OK but without a result."""
    return ServerFailed("the server ended the stream without a result", status="INTERNAL", request_id=request_id)
