import pytest

from tests.ranks import RankPool


@pytest.fixture(scope="session")
def ranks():
    """`ranks(fn, ..., dp=1, ep=1, pp=1, tp=1)`: results of fn(mesh, ...) on every rank of the mesh, by rank."""
    pool = RankPool()
    yield pool.run
    pool.close()
