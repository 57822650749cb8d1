"""Every backend held against the reference over the shared cases: the CPU's here, Triton's in the interpreter lane."""

import pytest
from cases import CASES, check


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_pass_is_the_reference(backend, case):
    check(case, backend, noise=1e-5)
