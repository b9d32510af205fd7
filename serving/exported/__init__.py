"""Models that were exported with torch.export, read as data and served with a contract of their inputs and outputs."""
