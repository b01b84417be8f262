"""Measurements that developers run, from the root of a checkout: `python -m benchmarks --help`."""
