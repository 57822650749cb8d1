"""Every backend held against the reference over the shared cases: the CPU's here, Triton's in the interpreter's and emulator's lanes.

The emulator compiles what it runs: there every fourth case, others for sm_90 than for sm_80, and all with ZO_CORE_PTX_ALL=1.
"""

import os

import pytest
from cases import CASES, check
from conftest import EMULATED

SOME = slice(None)
if EMULATED and os.environ.get("ZO_CORE_PTX_ALL") != "1":
    SOME = slice(2 if int(EMULATED) >= 90 else 0, None, 4)


@pytest.mark.parametrize("case", CASES[SOME], ids=str)
def test_a_pass_is_the_reference(backend, case):
    check(case, backend, noise=1e-5)
