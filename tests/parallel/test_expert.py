"""Expert dispatch and combine: who serves what, and that what comes home is what each token's experts made of it."""

import torch

from heiretsu.parallel.expert import combine, dispatch
from heiretsu.parallel.mesh import Mesh, abstract_mesh

E, K, C = 4, 2, 3


def served_and_combined(mesh: Mesh, num_tokens: list[int], hot: bool = False):
    """Expert e multiplies by e + 1. Returns what this rank serves, y, and what a loop over tokens gives."""
    generator = torch.Generator().manual_seed(mesh.ep.index)
    n = num_tokens[mesh.ep.index]
    x = torch.randn(n, C, dtype=torch.float64, generator=generator)
    experts = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(n)]) if n else x.new_empty(0, K)
    experts = torch.full((n, K), E - 1) if hot else experts.long()
    gates = torch.rand(n, K, dtype=torch.float64, generator=generator)
    there = dispatch(x, experts, gates, E, mesh.ep)
    first = mesh.ep.index * E // mesh.ep.size
    served = (there.rows[:, None] * ((first + there.experts + 1) * there.gates)[..., None]).sum(1)
    y = combine(served, there, mesh.ep)
    by_hand = [sum(gates[i, k] * (experts[i, k] + 1) * x[i] for k in range(K)) for i in range(n)]
    return there.experts.flatten(), y, torch.stack(by_hand) if by_hand else x


def test_over_one_rank_it_is_the_identity():
    _, y, by_hand = served_and_combined(abstract_mesh(), [5])
    torch.testing.assert_close(y, by_hand)
    x, experts, gates = torch.ones(5, C), torch.zeros(5, K, dtype=torch.long), torch.ones(5, K)
    there = dispatch(x, experts, gates, E, abstract_mesh().ep)
    assert there.rows is x and there.experts is experts and there.gates is gates
    assert combine(x, there, abstract_mesh().ep) is x


def test_tokens_come_home_from_the_ranks_that_hold_their_experts(ranks):
    for numbers in ([5, 7], [0, 3]):  # a rank without tokens still serves
        for served, y, by_hand in ranks(served_and_combined, numbers, ep=2):
            assert ((served >= 0) & (served < E // 2)).all()
            torch.testing.assert_close(y, by_hand)


def test_a_rank_may_serve_every_token_or_none(ranks):
    (idle, *_), (busy, y, by_hand) = ranks(served_and_combined, [2, 3], hot=True, ep=2)
    assert len(idle) == 0 and busy.tolist() == [E // 2 - 1] * 5 * K
    torch.testing.assert_close(y, by_hand)
