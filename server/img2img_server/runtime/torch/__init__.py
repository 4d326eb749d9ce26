"""Parts of a model that run in PyTorch."""
