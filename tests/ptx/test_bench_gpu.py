"""The correctness gate of the GPU acceptance program, on the kernels as compiled, at small sizes and with a few of its cases."""

import os

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("kernels are interpreted in this process, and never compiled", allow_module_level=True)

from zo_core.kernels import selfcheck

import ptx
from bench import gpu


def test_the_gate_is_green_on_the_kernels_as_compiled_and_red_on_a_wrong_one(monkeypatch, capsys):
    every = 9 if os.environ.get("ZO_CORE_PTX_ALL") else 240
    with ptx.emulated(int(os.environ.get("ZO_CORE_PTX", "80"))):
        bench = gpu.Bench(smoke=True, minutes=8, every=every)
        assert gpu.gate(bench), [g for g in bench.result["gate"] if g["error"]]
        names = [g["name"] for g in bench.result["gate"]]
        assert {name.split()[0] for name in names} == {
            "answer",
            "pass",
            "bounds",
            "launch",
            "sums",
            "rows,",
            "encoding",
        }
        from zo_core.kernels import triton as backend

        monkeypatch.setattr(backend, "philox_", lambda words, **key: words.zero_())
        monkeypatch.setattr(selfcheck, "ANSWERS", dict(list(selfcheck.ANSWERS.items())[:2]))
        bench = gpu.Bench(smoke=True, minutes=8, every=10**6)
        assert not gpu.gate(bench)
        assert [g["name"] for g in bench.result["gate"] if g["error"]] == ["answer Philox words"]
