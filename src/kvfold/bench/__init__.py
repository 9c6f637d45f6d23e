"""Speed and memory, measured beside the uncompressed rival, and a record of the runs."""

from kvfold.bench.attend import bench_attend
from kvfold.bench.encode import bench_encode
from kvfold.bench.generate import bench_generate
from kvfold.bench.record import record

__all__ = ["bench_attend", "bench_encode", "bench_generate", "record"]
