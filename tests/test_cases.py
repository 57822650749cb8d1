"""Every backend held against the reference over the shared cases: the CPU's here, Triton's in the interpreter's and emulator's lanes.

In the emulator every second case compiles and runs, and with ZO_CORE_PTX_ALL=1 each one.
"""

import os

import pytest
from cases import CASES, check
from conftest import EMULATED

EVERY = 2 if EMULATED and os.environ.get("ZO_CORE_PTX_ALL") != "1" else 1


@pytest.mark.parametrize("case", CASES[::EVERY], ids=str)
def test_a_pass_is_the_reference(backend, case):
    check(case, backend, noise=1e-5)
