"""Backends, which run requests: an engine in this process, or replicas on Ray."""
