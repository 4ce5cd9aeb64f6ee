"""Packing of many lengths: ours against TRL's `bfd`, in time and in how full the packs are.

`python benchmarks/data/packing.py --rows 1000000 --rounds 3` prints a Markdown table. Lengths are log-normal, at most
2,048, as those of a mix of chats. TRL packs the rows themselves; only its assignment of rows to packs is measured.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

CAPACITY = 2048


def ours(lengths: np.ndarray) -> tuple[int, float]:
    from finetuning.data.packing import pack

    packing = pack(lengths, CAPACITY)
    return len(packing), packing.filled


def trl(lengths: np.ndarray) -> tuple[int, float]:
    import pyarrow as pa
    from trl.data_utils import _pack_bfd

    borders = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = pa.LargeListArray.from_arrays(borders, pa.array(np.zeros(int(borders[-1]), dtype=np.int8)))
    packed = _pack_bfd(pa.table({"input_ids": ids}), CAPACITY, "truncate")
    return packed.num_rows, float(lengths.sum() / (packed.num_rows * CAPACITY))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures packing.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    draws = np.random.default_rng(0).lognormal(4.0, 0.8, options.rows)
    lengths = np.clip(draws.astype(np.int64), 1, CAPACITY)
    variants: dict[str, Callable[[np.ndarray], tuple[int, float]]] = {"ours": ours, "trl bfd": trl}
    measured: dict[str, list[tuple[float, float, int, float]]] = {name: [] for name in variants}
    for _ in range(options.rounds):
        for name, variant in variants.items():
            variant(lengths[:100])
            wall, cpu = time.monotonic(), time.process_time()
            packs, filled = variant(lengths)
            measured[name].append((time.process_time() - cpu, time.monotonic() - wall, packs, filled))
    print(f"{options.rows:,} lengths, {int(lengths.sum()):,} tokens, packs of {CAPACITY:,}\n")
    print("| packing | CPU s | wall s | packs | filled |\n|---|---|---|---|---|")
    for name, rounds in measured.items():
        cpu, wall = (statistics.median(one[index] for one in rounds) for index in (0, 1))
        print(f"| {name} | {cpu:.2f} | {wall:.2f} | {rounds[0][2]:,} | {rounds[0][3]:.2%} |")


if __name__ == "__main__":
    main()
