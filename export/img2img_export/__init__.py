"""Converts a diffusers model into a verified bundle for the server."""
