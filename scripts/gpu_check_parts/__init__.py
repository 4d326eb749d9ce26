"""What `scripts/gpu_check` is made of: bundles of random weights, things to time, and the sections that time them."""
