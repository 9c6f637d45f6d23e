"""Speed and memory, measured beside the uncompressed rival, and a record of the runs."""

from kvfold.bench.generate import bench_generate
from kvfold.bench.record import record

__all__ = ["bench_generate", "record"]
