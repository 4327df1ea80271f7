"""The old place of `guards.suite.benchmarks`."""

from guards.suite.benchmarks import Benchmark, benchmark_names, benchmarks, load_benchmark

__all__ = ["Benchmark", "benchmark_names", "benchmarks", "load_benchmark"]
