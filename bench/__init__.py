"""Benchmarks: `make bench`. Ratios measured in one run; absolute figures hold for one machine only."""
