"""Benchmarks of SOAA against its peers on small real tasks: ``python -m benchmarks --help``."""
