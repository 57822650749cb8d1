"""The lane is green on the kernels as they are and red on each fault of ``mutants.py``."""

import os

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("kernels are interpreted in this process, and never compiled", allow_module_level=True)

from zo_core.kernels import triton as backend

import ptx
from ptx import mutants

CAPABILITY = int(os.environ.get("ZO_CORE_PTX", "80"))


@pytest.fixture(scope="module", autouse=True)
def gpu():
    with ptx.emulated(CAPABILITY) as gpu:
        yield gpu


@pytest.mark.parametrize(
    "mutant", {m.check: m for m in mutants.MUTANTS}.values(), ids=lambda m: str(getattr(m.check, "__name__", m.check))
)
def test_the_kernels_pass(mutant):
    mutant.found_by(backend)


def test_no_addition_is_left_for_ptxas_to_fuse(gpu):
    """Else the emulator could not know what the hardware computes."""
    assert gpu.forms and not [text for kernel in gpu.forms.values() for text in kernel.fusible]


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: m.name)
def test_a_mutant_is_found(mutant, tmp_path):
    broken = mutants.load(mutant, tmp_path)
    with pytest.raises((AssertionError, ptx.PTXError)):
        mutant.found_by(broken)


def test_every_mutant_changes_a_text_that_is_there_once():
    assert len({m.name for m in mutants.MUTANTS}) == len(mutants.MUTANTS) >= 20
    for m in mutants.MUTANTS:
        assert (mutants.KERNELS / m.file).read_text().count(m.old) == 1, f"{m.name}: {m.file} has not {m.old!r} once"
    assert {m.file for m in mutants.MUTANTS} == {
        "factored.py", "gate.py", "noise.py", "passes.py", "places.py", "residuals.py", "rounding.py", "rows.py", "streams.py", "sums.py"
    }  # fmt: skip
