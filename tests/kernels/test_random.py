"""The random bits are Philox's, and reach the masks by the rule that random.py states."""

import pytest
import torch

from heiretsu.kernels.cpu.random import BlockPhilox
from heiretsu.kernels.random import Dropout, attention_keep_mask, drop_threshold, dropout_keep_mask, philox, signed

# Salmon et al., Random123 1.14, kat_vectors: philox 4x32 10, counter, key, the first word of the answer.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), 0x6627E8D5),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, 0x408F276D),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), 0xD16CFE09),
]


@pytest.mark.parametrize(("counter", "key", "word"), KNOWN)
def test_the_published_vectors(counter, key, word):
    seed = key[0] + (key[1] << 32)
    assert int(philox(seed, *map(torch.tensor, counter))) == word
    column, row, head, batch = counter
    assert BlockPhilox(1).draw(seed, torch.tensor([row]), torch.tensor([column]), head, batch).tolist() == [[word]]


def test_a_scratch_larger_than_the_block_changes_nothing():
    rows, columns = torch.arange(3), torch.arange(5)
    exact, larger = (BlockPhilox(size).draw(7, rows, columns, 1, 2).clone() for size in (15, 40))
    assert torch.equal(exact, larger)


def test_masks_count_as_they_say():
    """attention: (key, query, head, batch); dropout: (channel, position, 0, sample)."""
    mask = attention_keep_mask((2, 3, 4, 5), 0.4, 2**40 + 9, offsets=(6, 2**33 + 7))
    assert mask[1, 2, 3, 4] == (philox(2**40 + 9, torch.tensor(4), 3, 2 + 7, 1 + 6) >= drop_threshold(0.4))
    every = [
        [[[philox(2**40 + 9, torch.tensor(j), i, h + 7, b + 6) >= int(0.4 * 2**32) for j in range(5)] for i in range(4)]
         for h in range(3)] for b in range(2)
    ]  # fmt: skip
    assert torch.equal(mask, torch.tensor(every))
    mask = dropout_keep_mask((2, 3, 4), 0.6, -5, offset=2)
    every = [[[philox(-5, torch.tensor(c), t, 0, b + 2) >= int(0.6 * 2**32) for c in range(4)] for t in range(3)]
             for b in range(2)]  # fmt: skip
    assert torch.equal(mask, torch.tensor(every))
    assert torch.equal(attention_keep_mask((1, 1, 2, 3), 0.5, 1), attention_keep_mask((1, 1, 2, 3), 0.5, 1, (0, 0)))
    assert torch.equal(dropout_keep_mask((1, 2, 3), 0.5, 1), dropout_keep_mask((1, 2, 3), 0.5, 1, 0))


def test_two_s_complement():
    assert [signed(n) for n in (0, 5, -5, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**64 + 3)] == [
        0, 5, -5, 2**63 - 1, -(2**63), -1, 0, 3,
    ]  # fmt: skip
    assert [signed(n, 32) for n in (2**31 - 1, 2**31, 2**32 + 1, 2**62)] == [2**31 - 1, -(2**31), 1, 0]


def test_dropout_of_attention():
    dropout = Dropout.of(0.25, 11, 2**31, 2**32 + 3)
    assert dropout == Dropout(0.25, 11, -(2**31), 3)
    assert dropout.drop_below == drop_threshold(0.25) == 2**30 and dropout.keep_scale == 1 / 0.75
    assert Dropout.of(0.0, 0, 0, 0).drop_below == 0
