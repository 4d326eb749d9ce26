"""The gRPC front: servicers, interceptors, parsing, TLS, and the life of the server."""
