"""The lanes of a batch of CTAs: who they are, and picking the active ones.

Every thread of every CTA of the batch is one lane, an element of a NumPy array. A value is an array over lanes, or a
scalar when all lanes hold the same. A mask is a boolean array over lanes, or None when all lanes are active.
"""

import numpy as np

WARP = 32
WARPGROUP = 128

# Special registers that read as zero: there is one clock tick and one multiprocessor.
ZERO = ("%tid.y", "%tid.z", "%smid", "%clock", "%clock_lo", "%cluster_ctarank")
ZERO64 = ("%clock64", "%globaltimer")
SPECIAL = {
    *ZERO,
    *ZERO64,
    *("%tid.x", "%laneid", "%warpid", "%nwarpid", "%lanemask_lt"),
    *(f"%{kind}.{axis}" for kind in ("ntid", "ctaid", "nctaid") for axis in "xyz"),
}


class Batch:
    """Geometry of the CTAs that run together: arrays over lanes.

    cta: linear program id; slot: index of the CTA in the batch; warp: index of the warp in the batch; warp_in_cta;
    lane: index in the warp. epoch (per slot): barriers passed so far, which orders accesses of a CTA's warps.
    """

    def __init__(self, ctas, grid, threads: int):
        self.num_ctas, self.threads = len(ctas), threads
        self.num_lanes = self.num_ctas * threads
        self.num_warps = self.num_lanes // WARP
        index = np.arange(self.num_lanes)
        self.slot, self.lane, self.warp = index // threads, index & (WARP - 1), index // WARP
        self.warp_in_cta = (index % threads) // WARP
        ctas = np.asarray(ctas, np.int64)
        self.cta = ctas[self.slot]
        self.epoch = np.zeros(self.num_ctas, np.int32)
        self.everyone = np.arange(self.num_lanes)
        self.special = self._special_registers(ctas, grid)

    def _special_registers(self, ctas, grid):
        gx, gy, gz = grid
        tid = np.arange(self.num_lanes, dtype=np.uint32) % np.uint32(self.threads)
        below = (np.uint64(1) << (tid & np.uint32(31)).astype(np.uint64)) - np.uint64(1)
        registers = {name: np.uint32(0) for name in ZERO} | {name: np.uint64(0) for name in ZERO64}
        registers |= {"%tid.x": tid, "%laneid": tid & np.uint32(31), "%warpid": tid >> np.uint32(5)}
        registers |= {"%nwarpid": np.uint32(self.threads // WARP), "%lanemask_lt": below.astype(np.uint32)}
        registers |= {"%ntid.x": np.uint32(self.threads), "%ntid.y": np.uint32(1), "%ntid.z": np.uint32(1)}
        for axis, ids, count in (("x", ctas % gx, gx), ("y", ctas // gx % gy, gy), ("z", ctas // (gx * gy), gz)):
            ids = ids.astype(np.uint32)
            registers[f"%ctaid.{axis}"] = ids[0] if self.num_ctas == 1 else ids[self.slot]
            registers[f"%nctaid.{axis}"] = np.uint32(count)
        return registers

    def active(self, mask) -> np.ndarray:
        """Indices of the active lanes."""
        return self.everyone if mask is None else np.flatnonzero(self.whole(mask))

    def whole(self, value) -> np.ndarray:
        """A value as an array over all lanes; not a copy."""
        if getattr(value, "ndim", 0):
            return value
        return np.full(self.num_lanes, value)

    def mask(self, mask) -> np.ndarray:
        return np.ones(self.num_lanes, np.bool_) if mask is None else self.whole(mask)

    def spread(self, values, lanes) -> np.ndarray:
        """An array over all lanes that holds `values` at `lanes` and zero elsewhere."""
        if len(lanes) == self.num_lanes:
            return values
        result = np.zeros(self.num_lanes, values.dtype)
        result[lanes] = values
        return result

    def by_warp(self, value) -> np.ndarray:
        """(warps, 32) form of a value."""
        return self.whole(value).reshape(-1, WARP)

    def active_warps(self, mask) -> np.ndarray:
        """Indices of the warps with an active lane."""
        return np.arange(self.num_warps) if mask is None else np.flatnonzero(self.by_warp(mask).any(1))

    def from_warps(self, rows, warps) -> list[np.ndarray]:
        """(len(warps), registers, 32) -> one array over all lanes for each register."""
        if len(warps) != self.num_warps:
            padded = np.zeros((self.num_warps, *rows.shape[1:]), rows.dtype)
            padded[warps] = rows
            rows = padded
        return list(np.ascontiguousarray(rows.swapaxes(0, 1)).reshape(rows.shape[1], -1))
