"""The gRPC API: servicers, interceptors, parsing, TLS, and the server's lifecycle."""
