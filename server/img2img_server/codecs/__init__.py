"""Decoding and encoding in processes of their own: bounded by work, time and memory, and shared fairly among clients."""
