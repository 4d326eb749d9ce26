"""ONNX graphs instead of a pipeline's torch modules: sessions, runners, and the choice of a provider."""
