"""What bench/wire.py counts of a collective: the bytes that leave a rank."""

import torch
import torch.distributed as dist

from heiretsu.bench.wire import BytesSent, waiting
from heiretsu.parallel.collectives import all_reduce, all_to_all


def counted(mesh):
    axis = mesh.dp
    with BytesSent() as sent, waiting() as waited:
        all_reduce(torch.ones(90), axis)
        counts = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
        all_to_all(
            torch.ones(sum(counts[axis.index]), 10), counts[axis.index], [row[axis.index] for row in counts], axis
        )
        if axis.index == 0:
            dist.send(torch.ones(50), 1)
        if axis.index == 1:
            dist.recv(torch.ones(50), 0)
        dist.barrier()
    return sent.bytes, sent.total, waited.seconds


def test_bytes_are_those_that_leave_this_rank(ranks):
    found = ranks(counted, dp=3)
    leaving = [4 * 10 * (2 + 3), 4 * 10 * (4 + 6), 4 * 10 * (7 + 8)]
    for rank, (by_name, total, waited) in enumerate(found):
        assert by_name["allreduce"] == 4 * 90 * 2 * 2 // 3
        assert by_name["alltoall_base"] == leaving[rank]
        assert by_name["send"] == (200 if rank == 0 else 0)
        assert total == sum(by_name.values()) and waited > 0
