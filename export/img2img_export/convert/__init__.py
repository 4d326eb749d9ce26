"""From PyTorch modules to ONNX graphs in the precision asked for."""
