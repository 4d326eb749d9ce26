"""Whether graphs and images are what diffusers computes."""
