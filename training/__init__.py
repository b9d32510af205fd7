"""Training workloads in plain PyTorch: `python -m training.census`, `digits`, `search`, `gan`."""
