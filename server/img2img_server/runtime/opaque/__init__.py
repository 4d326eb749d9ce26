"""Opaque pipelines: they run through their own `__call__`, which requests may share."""
