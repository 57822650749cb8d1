"""The operation on numpy arrays and from C: the same bits as on tensors, in the memory that was given."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from zo_core.bindings import native

from zo_core.arrays import perturb_

ROOT = Path(__file__).parent.parent
NUMPY = {torch.float32: np.float32, torch.float16: np.float16}


def on_tensor(w, streams, coeffs, seed=5, tensor_id=2, offset=0, distribution="gaussian", decay=0.0, update=None):
    counters = torch.zeros(2, dtype=torch.int64)
    torch.ops.zo_core.update_(
        [w], [], [tensor_id], [offset], torch.tensor(streams), torch.tensor(coeffs).unsqueeze(1), seed=seed,
        distribution=distribution, counters=counters, decay=torch.tensor([decay]),
        update=None if update is None else torch.tensor([update]),
    )  # fmt: skip
    return int(counters[1])


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("update", [None, 4])
def test_arrays_are_perturbed_as_tensors_are(dtype, distribution, update):
    start = torch.linspace(-1, 1, 7 * 143).view(7, 143).to(dtype)
    w, a = start.clone(), start.clone().numpy()
    memory = a.__array_interface__["data"]
    options = {"offset": 130, "distribution": distribution, "decay": 0.1, "update": update}
    on_tensor(w, [3, 9], [0.5, -0.25], **options)
    assert perturb_(a, [3, 9], [0.5, -0.25], seed=5, tensor_id=2, **options) == 0
    assert a.dtype == NUMPY[dtype] and a.__array_interface__["data"] == memory
    assert np.array_equal(a, w.numpy()) and not np.array_equal(a, start.numpy())


def test_one_probe_may_be_given_as_numbers_and_slices_have_their_tensors_noise():
    whole, parts = np.zeros(1000, np.float32), np.zeros(1000, np.float32)
    perturb_(whole, 3, 1e-3, seed=2**64 - 1)
    perturb_(parts[:301], [3], [1e-3], seed=2**64 - 1)
    perturb_(parts[301:], 3, 1e-3, seed=2**64 - 1, offset=301)
    assert np.array_equal(whole, parts) and 0.9e-3 < whole.std() < 1.1e-3


def test_bfloat16_of_ml_dtypes():
    bfloat16 = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed").bfloat16
    a, w = (np.arange(1001) / 1024).astype(bfloat16), (torch.arange(1001) / 1024).bfloat16()
    assert np.array_equal(a.view(np.int16), w.view(torch.int16).numpy())
    perturb_(a, 3, 0.5, seed=5, tensor_id=2)
    on_tensor(w, [3], [0.5])
    assert np.array_equal(a.view(np.int16), w.view(torch.int16).numpy())


def test_what_saturates_is_counted():
    a = np.full(64, 65504, np.float16)
    assert 0 < perturb_(a, 0, 1e4, seed=0) < 64 and np.isfinite(a).all()


@pytest.mark.parametrize(
    ("array", "options", "error", "message"),
    [
        ([1.0], {}, TypeError, "array: expected a numpy array of one of .*got <class 'list'>"),
        (np.zeros(3), {}, TypeError, "array: expected a numpy array of one of .*got float64"),
        (np.zeros(3, ">f4"), {}, TypeError, "array: expected a numpy array"),
        (np.zeros((4, 4), np.float32)[:, ::2], {}, ValueError, "array: expected a writable C-contiguous array"),
        (np.broadcast_to(np.float32(1), 1), {}, ValueError, "array: expected a writable C-contiguous array"),
        (np.zeros(3, np.float32), {"coeffs": np.nan}, ValueError, "coeffs, decay: expected finite numbers, got nan"),
        (np.zeros(3, np.float32), {"decay": np.inf}, ValueError, "coeffs, decay: expected finite numbers"),
        (np.zeros(3, np.float32), {"coeffs": [1.0, 2.0]}, ValueError, "coeffs"),
        (np.zeros(3, np.float32), {"distribution": "uniform"}, ValueError, "distribution"),
        (np.zeros(3, np.float32), {"offset": -1}, ValueError, "offset"),
        (np.zeros(3, np.float32), {"seed": 1 << 65}, ValueError, "seed"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_written(array, options, error, message):
    before = np.array(array, copy=True)
    with pytest.raises(error, match=message):
        perturb_(array, **{"streams": 1, "coeffs": 0.1, "seed": 0, **options})
    assert np.array_equal(array, before)


def test_the_c_program_perturbs_and_restores_to_the_same_bits(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or not native.available():
        pytest.skip(f"no C compiler, or the native library is {native.why_missing}")
    here, program = native.LIBRARY.parent, tmp_path / "perturb"
    subprocess.run(
        [compiler, "-std=c11", "-Wall", "-Wextra", "-pedantic", "-Werror", f"-I{ROOT / 'bindings' / 'include'}",
         str(ROOT / "examples" / "c" / "perturb.c"), str(native.LIBRARY), f"-Wl,-rpath,{here}", "-o", str(program)],
        check=True,
    )  # fmt: skip
    done = subprocess.run(
        [program, tmp_path / "moved", tmp_path / "restored"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("100003 weights perturbed and restored to within ")
    assert float(done.stdout.split()[-1]) < 1e-7

    before = native.get_isa()
    native.set_isa(native.isas()[-1])  # what the library chooses by itself
    try:
        w = ((np.arange(100003) % 1000 - 500) / 1024).astype(np.float32)
        for name, c in (("moved", 1e-3), ("restored", -1e-3)):
            perturb_(w, 3, c, seed=42, tensor_id=7)
            assert np.array_equal(w, np.fromfile(tmp_path / name, np.float32))
    finally:
        native.set_isa(before)
