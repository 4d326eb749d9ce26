"""Pipelines that run through their own `__call__`, and the requests that may share such a call."""
