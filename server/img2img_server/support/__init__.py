"""Utilities without dependencies on other packages: the current call, fair queueing, cancellation, threads, child processes."""
