"""Measurements side by side with named peers. `python -m benchmarks.run --help`."""
