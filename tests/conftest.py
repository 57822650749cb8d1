"""Shared fixtures: the CPU backends, one a parameter, and hypothesis without deadlines (machines differ)."""

from collections.abc import Iterator

import pytest
from hypothesis import settings
from zo_core.bindings import native
from zo_core.kernels import reference

settings.register_profile("zo_core", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("zo_core")

NATIVE = native.isas() or ("none",)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The native library on one instruction set; ask for it with ``@pytest.mark.parametrize("isa", NATIVE, indirect=True)``."""
    if not native.available():
        pytest.skip(f"the native library is {native.why_missing}")
    before = native.get_isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


@pytest.fixture(params=["reference", *NATIVE])
def backend(request: pytest.FixtureRequest) -> Iterator[object]:
    """Every CPU backend: the module with ``run_pass`` and ``philox_``."""
    if request.param == "reference":
        yield reference
        return
    if not native.available():
        pytest.skip(f"the native library is {native.why_missing}")
    before = native.get_isa()
    native.set_isa(request.param)
    yield native
    native.set_isa(before)
