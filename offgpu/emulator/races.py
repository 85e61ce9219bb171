"""The race model: who last wrote and read each piece of memory, and what orders accesses.

Memory is watched in granules: the widest unit that every access of the kernel covers whole (1 to 8 bytes). Two accesses
of one granule, one of them a write, conflict unless they are ordered:

- lanes of one warp count as ordered;
- warps of one CTA are ordered by a barrier between the accesses: each CTA counts its barriers (the epoch);
- CTAs are ordered by a release and an acquire on the same address (vector clocks), and by nothing else.

Writing the value that is already there is no conflict: Triton stores replicated values from several warps.
"""

import numpy as np

from heiretsu.offgpu.emulator.numerics import UNSIGNED

NEVER = -1
IN_FLIGHT = 2**31 - 1  # epoch of shared memory that a cp.async is writing
MANY = np.int8(127)  # reader or writer: several warps


def granules(index, width, granule):
    """(lanes, granules per access) indices of the granules under accesses of `width` bytes at byte `index`."""
    return (index // granule)[:, None] + np.arange(max(width // granule, 1))


def rows_with(flags) -> int:
    """How many lanes have a flagged granule."""
    return int(flags.any(1).sum())


class SharedRaces:
    """Shared memory of one batch. For each granule: epoch of the last write and read, and the warp that did it."""

    def __init__(self, batch, memory, granule: int, report):
        self.batch, self.granule, self.report = batch, granule, report
        self.contents = memory.view(UNSIGNED[8 * granule])
        n = len(self.contents)
        self.write_epoch, self.writer = np.full(n, NEVER, np.int32), np.zeros(n, np.int8)
        self.read_epoch, self.reader = np.full(n, NEVER, np.int32), np.zeros(n, np.int8)

    def _find(self, index, width, lanes):
        cells = granules(index, width, self.granule)
        epoch = self.batch.epoch[self.batch.slot[lanes]][:, None]
        return cells, epoch, self.batch.warp_in_cta[lanes].astype(np.int8)[:, None]

    def read(self, index, width, lanes, where):
        """Check a read by `lanes`, and remember it."""
        cells, epoch, warp = self._find(index, width, lanes)
        self._check_read(cells, epoch, warp, where)
        _remember(self.read_epoch, self.reader, cells, epoch, warp)

    def read_by_warpgroups(self, index, lanes, where):
        """Check a read of 16-byte rows (groups, rows) that all four warps of each group make together."""
        cells, epoch, _ = self._find(index.reshape(-1), 16, np.repeat(lanes, index.shape[1]))
        self._check_read(
            cells, epoch, MANY - np.int8(1), where
        )  # no warp's number: whoever wrote it, another one reads
        self.read_epoch[cells], self.reader[cells] = epoch, MANY

    def _check_read(self, cells, epoch, warp, where):
        written = self.write_epoch[cells]
        if (written == NEVER).any():
            self.report.add(
                "uninit-shared", where(), "shared memory read before any write", rows_with(written == NEVER)
            )
        if (written == IN_FLIGHT).any():
            text = "shared memory read while a cp.async into it is in flight"
            self.report.add("cpasync", where(), text, rows_with(written == IN_FLIGHT))
        racing = (written == epoch) & (self.writer[cells] != warp)
        if racing.any():
            text = "read of a value another warp wrote since the last barrier"
            self.report.add("race-shared", where(), text, rows_with(racing))

    def write(self, index, width, lanes, values, where, in_flight=False):
        """Check a write of `values` (lanes, ...) and remember it; in_flight: by a cp.async, whose data comes later."""
        cells, epoch, warp = self._find(index, width, lanes)
        new = None if in_flight else values.reshape(len(lanes), -1).view(self.contents.dtype)
        # Warps of a CTA store one after another, so that a conflict inside this very instruction shows too.
        if self._several_warps_on_one_cell(cells, warp):
            turns: list = [np.flatnonzero(warp[:, 0] == w) for w in np.unique(warp)]
        else:
            turns = [slice(None)]
        for turn in turns:
            mine, now, who = cells[turn], np.broadcast_to(epoch[turn], cells[turn].shape), warp[turn]
            racing = (self.read_epoch[mine] == now) & (self.reader[mine] != who)
            if racing.any():
                text = "write over a value another warp read since the last barrier"
                self.report.add("race-shared", where(), text, rows_with(racing))
            racing = (self.write_epoch[mine] == now) & (self.writer[mine] != who)
            if racing.any() and not in_flight:
                same = self.contents[mine] == new[turn]
                racing = racing & ~same & ~np.isin(mine, mine[same])  # a replica, up to which lane of the warp wins
            if racing.any():
                text = "write over a value another warp wrote since the last barrier"
                self.report.add("race-shared", where(), text, rows_with(racing))
            _remember(self.write_epoch, self.writer, mine, now, who)
            if in_flight:
                self.write_epoch[mine] = IN_FLIGHT
            elif len(turns) > 1:
                self.contents[mine] = new[turn]

    def _several_warps_on_one_cell(self, cells, warp):
        if self.batch.threads == 32 or len(cells) <= 1:
            return False
        kept = self.writer[cells]
        self.writer[cells] = warp
        clash = bool((self.writer[cells] != warp).any())
        self.writer[cells] = kept
        return clash

    def forget_in_flight(self, index, width):
        self.write_epoch[granules(index, width, self.granule)] = NEVER

    def atomic(self, index, width, lanes):
        """Atomics conflict with nothing here; they only count as the last write."""
        cells, epoch, warp = self._find(index, width, lanes)
        self.write_epoch[cells], self.writer[cells] = epoch, warp


def _remember(epochs, owners, cells, epoch, warp):
    """Set the owner of each cell to `warp`, or to MANY where another warp owned it in this epoch or does so now."""
    others = (epochs[cells] == epoch) & (owners[cells] != warp)
    owner = np.where(others, MANY, warp)
    owners[cells] = owner
    clash = owners[cells] != owner  # several warps in this very instruction
    if clash.any():
        owners[cells[clash]] = MANY
    epochs[cells] = epoch


class Clocks:
    """Order between CTAs. A release on an address publishes what its CTA has seen; an acquire there takes it over."""

    def __init__(self):
        self.of_cta: dict[int, dict[int, int]] = {}
        self.of_address: dict[int, dict[int, int]] = {}

    def sync(self, cta: int, address: int, acquire: bool, release: bool) -> None:
        mine = self.of_cta.setdefault(cta, {cta: 0})
        published = self.of_address.setdefault(address, {})
        if acquire:
            for other, time in published.items():
                mine[other] = max(mine.get(other, -1), time)
        if release:
            for other, time in mine.items():
                published[other] = max(published.get(other, -1), time)
            mine[cta] += 1

    def now(self, ctas) -> np.ndarray:
        if not self.of_cta:
            return np.zeros(len(ctas), np.int32)
        return np.array([self.of_cta.get(c, {}).get(c, 0) for c in ctas.tolist()], np.int32)

    def drop_ordered(self, unordered, other_cta, time, cta) -> None:
        """Clear the flags of earlier accesses (other_cta, time) that `cta` has seen the release of."""
        if self.of_address:
            for row, column in zip(*np.nonzero(unordered), strict=True):
                seen = self.of_cta.get(int(cta[row, 0]), {})
                if seen.get(int(other_cta[row, column]), -1) >= time[row, column]:
                    unordered[row, column] = False


class GlobalRaces:
    """Global memory of one launch. An access is a key: CTA << 40 | warp << 32 | epoch; NEVER where there was none."""

    def __init__(self, contents, granule: int, report, num_ctas: int, has_cas16: bool):
        self.granule, self.report, self.num_ctas, self.has_cas16 = granule, report, num_ctas, has_cas16
        self.contents = contents.view(UNSIGNED[8 * granule])
        n = len(self.contents)
        self.clocks = Clocks()
        self.write_key, self.write_time = np.full(n, NEVER, np.int64), np.zeros(n, np.int32)
        self.read_key, self.read_time = np.full(n, NEVER, np.int64), np.zeros(n, np.int32)
        self.read_by_many = np.zeros(n, np.bool_)  # by several CTAs
        self.written_atomically = np.zeros(n, np.bool_)

    def start(self, batch):
        self.batch = batch

    def _key(self, lanes):
        warp = self.batch.warp_in_cta[lanes].astype(np.int64)
        return (self.batch.cta[lanes] << 40 | warp << 32 | self.batch.epoch[self.batch.slot[lanes]])[:, None]

    def _unordered(self, earlier, time, key):
        """(same CTA, other CTA) flags: earlier accesses that nothing orders before those of `key`."""
        any_before = earlier >= 0
        if not any_before.any():
            return any_before, any_before.copy()
        same_cta = (earlier >> 40) == (key >> 40)
        other_warp = (earlier >> 32) != (key >> 32)
        same_epoch = (earlier & 0xFFFFFFFF) == (key & 0xFFFFFFFF)
        inter = any_before & ~same_cta
        if inter.any():
            self.clocks.drop_ordered(inter, earlier >> 40, time, key >> 40)
        return any_before & same_cta & other_warp & same_epoch, inter

    def _note(self, intra, inter, what, where):
        if intra.any():
            text = f"{what} another warp of the CTA since the last barrier"
            self.report.add("race-global", where(), text, rows_with(intra))
        if inter.any():
            self.report.add("race-global", where(), f"{what} another CTA with no ordering", rows_with(inter))

    def read(self, index, width, lanes, where):
        cells, key = granules(index, width, self.granule), self._key(lanes)
        intra, inter = self._unordered(self.write_key[cells], self.write_time[cells], key)
        if self.has_cas16:  # the plain first read of a compare-and-swap loop
            intra, inter = intra & ~self.written_atomically[cells], inter & ~self.written_atomically[cells]
        self._note(intra, inter, "read of a value written by", where)
        if self.num_ctas > 1:
            earlier = self.read_key[cells]
            self.read_by_many[cells] |= (earlier >= 0) & ((earlier >> 40) != (key >> 40))
        self.read_key[cells] = key
        self.read_time[cells] = self.clocks.now(self.batch.cta[lanes])[:, None]
        if self.batch.num_ctas > 1:  # several CTAs in this very instruction
            self.read_by_many[cells] |= (self.read_key[cells] >> 40) != (key >> 40)

    def write(self, index, width, lanes, values, where):
        cells, key = granules(index, width, self.granule), self._key(lanes)
        new = values.reshape(len(lanes), -1).view(self.contents.dtype)
        changes = self.contents[cells] != new
        intra, inter = self._unordered(self.read_key[cells], self.read_time[cells], key)
        if not self.clocks.of_address:
            inter |= self.read_by_many[cells]
        self._note(intra, inter, "write over a value read by", where)
        intra, inter = self._unordered(self.write_key[cells], self.write_time[cells], key)
        self._note(intra & changes, inter & changes, "write over a value written by", where)
        self._remember_write(cells, key, lanes, False)
        winner = self.write_key[cells]
        lost = winner != key
        if lost.any():  # several lanes, one address, one instruction: a conflict unless they agree
            kept = self.contents[cells].copy()
            self.contents[cells] = new
            lost &= self.contents[cells] != new
            self.contents[cells] = kept
            same_cta = (winner >> 40) == (key >> 40)
            self._note(lost & same_cta, lost & ~same_cta, "write over a value written by", where)

    def atomic(self, index, width, lanes, where):
        cells, key = granules(index, width, self.granule), self._key(lanes)
        plain = ~self.written_atomically[cells]
        _, inter = self._unordered(self.read_key[cells], self.read_time[cells], key)
        if not self.clocks.of_address:
            inter |= self.read_by_many[cells]
        self._note(inter & False, inter & plain, "atomic over a value read by", where)
        intra, inter = self._unordered(self.write_key[cells], self.write_time[cells], key)
        self._note(intra & plain, inter & plain, "atomic on a value written by", where)
        self._remember_write(cells, key, lanes, True)

    def _remember_write(self, cells, key, lanes, atomic):
        self.write_key[cells] = key
        self.write_time[cells] = self.clocks.now(self.batch.cta[lanes])[:, None]
        self.written_atomically[cells] = atomic
