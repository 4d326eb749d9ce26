"""Runs models: the only place of the server that imports onnxruntime, torch and diffusers."""
