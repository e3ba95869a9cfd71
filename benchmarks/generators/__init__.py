"""Load generators side by side: `python -m benchmarks.generators`."""
