"""The benchmark: cases x methods, in a folder that a run can be resumed from, with its tables and pages."""

from analysis.benchmark.results import Results
from analysis.benchmark.run import benchmark

__all__ = ["Results", "benchmark"]
