"""Runs models: the only package of the server that imports onnxruntime, torch and diffusers."""
