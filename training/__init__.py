"""Training workloads in plain PyTorch: `python -m training.census`, `training.digits`, `training.search`."""
