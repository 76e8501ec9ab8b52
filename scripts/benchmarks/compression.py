"""What other ways to compress chunks would spare, and what they would cost.

A program: ``python -m benchmarks.compression IMAGE`` compresses every eighth chunk of an image in one
thread, each by itself as backups do, and prints a table in Markdown. The dictionary is trained on
other chunks of the same image, which is the best case for it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import zstandard

from benchmarks.measure import Stopwatch
from benchmarks.workload import data_ranges

CHUNK_SIZE = 64 << 10
STEP = 8  # of so many chunks one is compressed
RUNS = 3
DICTIONARY_SIZE = 112 << 10
SAMPLE_SIZE_MAX = 32 << 20
MIB = 1 << 20


def read_chunks(image: Path, *, first: int) -> list[bytes]:
    """Every ``STEP``-th chunk that holds data, from the ``first`` on."""
    numbers = {
        number
        for start, end in data_ranges(image)
        for number in range(start // CHUNK_SIZE, -(-end // CHUNK_SIZE))
    }
    chunks = []
    with image.open("rb") as file:
        for number in sorted(numbers)[first::STEP]:
            file.seek(number * CHUNK_SIZE)
            chunks.append(file.read(CHUNK_SIZE))
    return [chunk for chunk in chunks if any(chunk)]


def row(
    name: str, chunks: Sequence[bytes], level: int, trained: zstandard.ZstdCompressionDict | None
) -> str:
    """A line of the table."""
    named = {} if trained is None else {"dict_data": trained}
    if trained is not None:
        trained.precompute_compress(level=level)
    compressor = zstandard.ZstdCompressor(level=level, **named)
    decompressor = zstandard.ZstdDecompressor(**named)
    compress_rates, decompress_rates = [], []
    size = sum(map(len, chunks))
    for _ in range(RUNS):
        watch = Stopwatch()
        stored = [compressor.compress(chunk) for chunk in chunks]
        compress_rates.append(size / watch.stop() / 1e6)
        watch = Stopwatch()
        for data in stored:
            decompressor.decompress(data)
        decompress_rates.append(size / watch.stop() / 1e6)
    part = 100 * sum(map(len, stored)) / size
    rates = (statistics.median(compress_rates), statistics.median(decompress_rates))
    return f"| {name} | {part:.1f} % | {rates[0]:,.0f} | {rates[1]:,.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure other ways to compress chunks.")
    parser.add_argument("image", type=Path, help="a raw image; holes are left out")
    image = parser.parse_args().image
    chunks = read_chunks(image, first=0)
    samples = read_chunks(image, first=STEP // 2)[
        :: max(1, len(chunks) * CHUNK_SIZE // SAMPLE_SIZE_MAX)
    ]
    trained = zstandard.train_dictionary(DICTIONARY_SIZE, samples)
    print(
        f"{len(chunks) * CHUNK_SIZE // MIB} MiB in chunks of {CHUNK_SIZE >> 10} KiB, one thread\n"
    )
    print("| zstd | stored | compressed, MB/s | decompressed, MB/s |")
    print("| --- | ---: | ---: | ---: |")
    for level in (-1, 1, 2, 3, 5, 9):
        print(row(f"level {level}", chunks, level, None), flush=True)
    for level in (1, 3):
        name = f"level {level}, dictionary of {DICTIONARY_SIZE >> 10} KiB"
        print(row(name, chunks, level, trained), flush=True)


if __name__ == "__main__":
    main()
