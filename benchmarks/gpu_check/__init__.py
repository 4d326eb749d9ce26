"""What `scripts/gpu_check` and `scripts/gpu_check_pack` are made of. docs/benchmarks.md, "Checking a GPU", has the commands."""
