"""Decoding and encoding in child processes, with limits on work, time and memory, shared fairly among clients."""
