"""The state of a stream: which events the caller has, so that a retry continues where the connection was lost.

`Started` has the first image's seed, and the others follow from it: a retry with this seed makes the same images on any server.
No event is delivered twice.
"""

from img2img.v1 import image_to_image_pb2 as messages

from img2img_client.errors import Img2ImgError, ServerFailed
from img2img_client.values import Progress, Queued, Started, TransformEvent


class Story:
    """One transform as its caller sees it, whatever attempts it takes. `request` is what the next attempt asks for.

    `begun` where the attempt that runs has been answered with anything.
    """

    def __init__(self, request: messages.TransformRequest) -> None:
        self.request = messages.TransformStreamRequest(request=request)
        self.begun = False
        self._started: Started | None = None
        self._step = 0
        self._again = False

    def tell(self, event: TransformEvent) -> TransformEvent | None:
        """The event, where it is news to the caller, else None: once it has started, nothing is queued again, and no step
        comes back."""
        if self._again and self._is_known(event):
            return None
        if isinstance(event, Started):
            self._started = event
            self.request.request.seed = event.seed
        if isinstance(event, Progress):
            self._step = event.step
        return event

    def lost(self) -> bool:
        """Takes notice that the attempt failed. Returns whether it had been answered with anything."""
        begun, self.begun, self._again = self.begun, False, True
        return begun

    def _is_known(self, event: TransformEvent) -> bool:
        if isinstance(event, Progress):
            return event.step <= self._step
        return self._started is not None and isinstance(event, Queued | Started)


def ended_without_result(request_id: str) -> Img2ImgError:
    """The error of a stream that ended well and gave nothing."""
    return ServerFailed("the server ended the stream without a result", status="INTERNAL", request_id=request_id)
