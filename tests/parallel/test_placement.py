"""Which part of a dim each rank holds."""

import torch

from heiretsu.parallel.mesh import Axis
from heiretsu.parallel.placement import shard_bounds


def test_a_dim_is_dealt_out_as_torch_chunk_and_so_a_checkpoint_deals_it_out():
    """Where the ranks do not divide it, too: 5 of them share the 384 rows of the bytes' embedding."""
    for size in (1, 2, 5, 7, 12, 384):
        for ranks in range(1, 9):
            parts = list(torch.arange(size).chunk(ranks))
            parts += [torch.arange(0)] * (ranks - len(parts))
            bounds = [shard_bounds(size, Axis("tp", ranks, index)) for index in range(ranks)]
            assert [list(range(*bound)) for bound in bounds] == [part.tolist() for part in parts], (size, ranks)
