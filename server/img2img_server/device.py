"""The one rule for all who use the device: nothing is allocated or freed on it while a call is recorded."""

import threading

DEVICE_IN_USE = threading.Lock()
"""Held while a call is recorded (pipelines/graph_replay.py), and by other threads that allocate or free on the device, as when a
pipeline is loaded or unloaded: that would break the recording, and be broken by it. There is one device in a process, so there
is one lock."""
