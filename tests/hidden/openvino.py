"""Stands before the installed OpenVINO on the path of tests and of the processes they start (conftest.py).

`--provider auto` would otherwise measure OpenVINO for every model that a test loads, and may compute in bfloat16.
"""

raise ImportError("hidden by tests/conftest.py")
