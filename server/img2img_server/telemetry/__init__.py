"""Metrics, traces, logs and the device timeline."""
