"""What differs between releases, asked of objects as each of them makes them."""

from types import SimpleNamespace

import pytest

from heiretsu.kernels import versions


@pytest.mark.parametrize(
    ("kernel", "names"),
    [
        (SimpleNamespace(do_not_specialize=["n", "seed"]), ("n", "seed")),  # compiled
        (SimpleNamespace(do_not_specialize=None, kwargs={"do_not_specialize": ["n"]}), ()),
        (SimpleNamespace(kwargs={"do_not_specialize": ["n"]}), ("n",)),  # interpreted
        (SimpleNamespace(kwargs={"do_not_specialize": None}), ()),
        (SimpleNamespace(kwargs={}), ()),
        (SimpleNamespace(), ()),
    ],
)
def test_arguments_that_are_not_specialised_are_found_however_a_kernel_is_kept(kernel, names):
    assert versions.unspecialised(kernel) == names
