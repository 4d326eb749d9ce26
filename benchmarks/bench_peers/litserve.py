"""Peer (d): LitServe around diffusers' pipeline, with batching."""

from pathlib import Path
from typing import Any

import litserve  # type: ignore[import-not-found]
from fastapi import Request

from bench_peers.common import parser, prepare_process
from bench_peers.whole_requests import MAX_BATCH, PATIENCE, BatchPipeline, announce_later, free_port


class _Api(litserve.LitAPI):  # type: ignore[misc]
    def __init__(self, model: Path) -> None:
        super().__init__(max_batch_size=MAX_BATCH, batch_timeout=PATIENCE, api_path="/transform")
        self._model = model

    def setup(self, device: str) -> None:
        """Loads the model, in the worker's process."""
        self._pipeline = BatchPipeline(self._model)

    def decode_request(self, request: Request) -> Any:
        """The message. LitServe reads the annotation: with this one it gives the object in the request's JSON."""
        return request["messages"][0]

    def predict(self, messages: Any) -> Any:
        """Makes the images of a batch."""
        return self._pipeline.make(messages)

    def encode_response(self, output: Any) -> Any:
        """The answer's JSON: as of BentoML, whose batches are lists."""
        return [output]


def _main() -> None:
    arguments = parser(__doc__).parse_args()
    port = free_port()
    announce_later("/health", port, arguments.port_file)
    server = litserve.LitServer(_Api(arguments.model), accelerator="cpu", workers_per_device=1, timeout=False)
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    prepare_process()
    _main()
