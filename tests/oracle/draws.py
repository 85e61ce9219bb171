"""What a run draws, from docs/repeat-a-run.md: initial values, places in the data, dropout masks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch

WORD = 2**32


def philox_4x32_10(counter: Sequence, key: Sequence[int]) -> list:
    """The four output words of Salmon et al. 2011, figure 2. counter: four arrays of words; key: two words."""
    c = [np.asarray(word, dtype=np.uint64) % np.uint64(WORD) for word in counter]
    k = list(key)
    for _ in range(10):
        product = [c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)]
        high = [p >> np.uint64(32) for p in product]
        low = [p % np.uint64(WORD) for p in product]
        c = [high[1] ^ c[1] ^ np.uint64(k[0]), low[1], high[0] ^ c[3] ^ np.uint64(k[1]), low[0]]
        k = [(k[0] + 0x9E3779B9) % WORD, (k[1] + 0xBB67AE85) % WORD]
    return c


def derived_seed(seed: int, *path: int | str) -> int:
    digest = hashlib.blake2b(repr((seed, *path)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") // 2


def normal(seed: int, name: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
    """A parameter's initial value: float32 normals from a generator of its own."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "init", name))
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def kept(shape: tuple[int, ...], p: float, seed: int, counters: Sequence) -> torch.Tensor:
    """Which elements a dropout mask keeps. counters: four arrays that broadcast to shape."""
    words, _, _, _ = philox_4x32_10(counters, (seed % WORD, seed // WORD))
    return torch.from_numpy(np.broadcast_to(words >= np.uint64(int(p * WORD)), shape).copy())


class Text:
    """One split of a data folder: its shards, one (N,) array each."""

    def __init__(self, shards: Sequence[np.ndarray], block_size: int):
        self.shards, self.block_size = shards, block_size

    def training_windows(self, seed: int, step: int, samples: Sequence[int]) -> torch.Tensor:
        """(len(samples), block_size + 1): every start in every shard is equally likely."""
        starts = [(shard, start) for shard in self.shards for start in range(len(shard) - self.block_size)]
        rows = []
        for sample in samples:
            word = int(np.random.Philox(counter=[0, sample, step, 0], key=[seed, 0]).random_raw())
            rows.append(self._window(*starts[word * len(starts) // 2**64]))
        return torch.stack(rows)

    def evaluation_windows(self, numbers: Sequence[int]) -> torch.Tensor:
        """Windows side by side, visited with a stride near the golden section of their count."""
        windows = [
            (shard, start) for shard in self.shards for start in range(0, len(shard) - self.block_size, self.block_size)
        ]
        stride = max(1, round(len(windows) * (math.sqrt(5) - 1) / 2))
        while math.gcd(stride, len(windows)) != 1:
            stride += 1
        return torch.stack([self._window(*windows[number * stride % len(windows)]) for number in numbers])

    def _window(self, shard: np.ndarray, start: int) -> torch.Tensor:
        return torch.from_numpy(shard[start : start + self.block_size + 1].astype(np.int64))
