"""Models and parts of models that run in PyTorch."""
