"""What every way of running a model shares: calls of torch, device copies, out of memory, CPU count, sizes."""
