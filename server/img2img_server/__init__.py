"""Serves image-to-image bundles over gRPC with step-level continuous batching."""
