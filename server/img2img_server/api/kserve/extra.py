"""Whether the stubs of KServe v2 are there: Triton's client ships them, and an extra brings that."""

from img2img_server.support.distribution import install_hint


def require() -> None:
    """Raises ValueError, which says what to install, where Triton's client cannot be imported."""
    try:
        import tritonclient.grpc  # type: ignore[import-untyped]  # noqa: F401
    except (ImportError, RuntimeError):  # RuntimeError is its own, where what it needs for gRPC is missing or too old
        raise ValueError(f"kserve needs Triton's client: {install_hint('kserve')}") from None
