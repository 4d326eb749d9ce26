"""Converts PyTorch modules to ONNX graphs in the requested precision."""
