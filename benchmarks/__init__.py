"""Benchmarks: python -m benchmarks.bench_<what> [--small] [--isa LEVEL] [--out FILE.csv]; all of them: python
-m benchmarks.run_all."""
