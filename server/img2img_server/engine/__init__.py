"""The step-level continuous batching engine. Imports neither grpc nor onnxruntime nor torch."""
