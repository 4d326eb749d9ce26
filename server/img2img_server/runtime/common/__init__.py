"""Shared by all ways of running a model: torch calls, device copies, out of memory, CPU count, VAEs, sizes."""
