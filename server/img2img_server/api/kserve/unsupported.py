"""What else Triton's service has: refused in words, where its own base class would fail."""

from typing import Any

from tritonclient.grpc import service_pb2_grpc  # type: ignore[import-untyped]

from img2img_server.errors import NotSupported


class Unsupported(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Statistics, shared memory and settings of tracing and of the log: UNIMPLEMENTED."""

    async def ModelStatistics(self, request: Any, context: Any) -> Any:
        """Refused: counters are Prometheus'."""
        raise NotSupported("model statistics are not supported by this method: use the Prometheus metrics (--metrics-port)")

    async def SystemSharedMemoryStatus(self, request: Any, context: Any) -> Any:
        """Refused, as all of shared memory."""
        raise _no_shared_memory()

    async def SystemSharedMemoryRegister(self, request: Any, context: Any) -> Any:
        """Refused, as all of shared memory."""
        raise _no_shared_memory()

    async def SystemSharedMemoryUnregister(self, request: Any, context: Any) -> Any:
        """Refused, as all of shared memory."""
        raise _no_shared_memory()

    async def CudaSharedMemoryStatus(self, request: Any, context: Any) -> Any:
        """Refused, as all of shared memory."""
        raise _no_shared_memory()

    async def CudaSharedMemoryRegister(self, request: Any, context: Any) -> Any:
        """Refused, as all of shared memory."""
        raise _no_shared_memory()

    async def CudaSharedMemoryUnregister(self, request: Any, context: Any) -> Any:
        """Refused, as all of shared memory."""
        raise _no_shared_memory()

    async def TraceSetting(self, request: Any, context: Any) -> Any:
        """Refused: set when the server is started."""
        raise NotSupported("trace settings cannot be changed at run time: set --otlp-endpoint at start")

    async def LogSettings(self, request: Any, context: Any) -> Any:
        """Refused: set when the server is started."""
        raise NotSupported("log settings cannot be changed at run time: set --log-format at start")


def _no_shared_memory() -> NotSupported:
    return NotSupported("shared memory is not supported: send the tensors' contents")
