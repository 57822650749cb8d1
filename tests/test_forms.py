"""Every kernel compiles: Triton, and ptxas for several architectures, with no GPU."""

import os

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, so not in the interpreter", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from zo_core.kernels.triton import launch, sums


def test_digits_compile():
    """Of any number of streams: the kernel has one form. As it was, 5 to 16 and more than 32 streams did not compile."""
    types = {"coeffs": "*fp32", "digits": "*i8", "totals": "*i32", "scales": "*fp32"}
    signature = {n: types.get(n, "i32") for n in sums.digits_kernel.arg_names}
    triton.compile(ASTSource(sums.digits_kernel, signature, {}), target=GPUTarget("cuda", 80, 32),
                   options=launch.options(1))  # fmt: skip
