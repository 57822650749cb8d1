"""Every backend held against the reference over the shared cases: the CPU's here, Triton's in the interpreter's and emulator's lanes.

The interpreter is slow, and the emulator compiles what it runs. They take cases in which every two choices that occur together
in any case occur together: the interpreter all of these, the emulator one half on sm_90 and the other on sm_80. With
ZO_CORE_PTX_ALL=1 they take all cases.
"""

import os
from dataclasses import replace

import pairs
import pytest
from cases import CASES, check
from conftest import EMULATED, TRITON_ON_CPU

SOME = CASES
if TRITON_ON_CPU and os.environ.get("ZO_CORE_PTX_ALL") != "1":
    SOME = [CASES[i] for i in pairs.few([vars(case) for case in CASES])]
    if EMULATED:
        SOME = SOME[int(EMULATED) >= 90 :: 2]
        # Each kind of tensor in a call is a form to compile: three of the seven, as the others have cases of their own.
        SOME = [replace(case, sizes=case.sizes[:3], offsets=case.offsets[:3]) if case.mixed else case for case in SOME]


@pytest.mark.parametrize("case", SOME, ids=str)
def test_a_pass_is_the_reference(backend, case):
    check(case, backend, noise=1e-5)
