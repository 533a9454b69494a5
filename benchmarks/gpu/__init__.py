"""GPU measurements: `python -m benchmarks.gpu --list`."""
