"""`scripts/gpu_check` and `scripts/gpu_check_pack`. docs/benchmarks.md, "Checking a GPU", has the commands."""
