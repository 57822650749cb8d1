"""torch.ops.zo_core: schemas and fakes (opcheck), clear errors before anything is written, dispatch."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from zo_core.bindings import native, ops  # noqa: F401  ops registers them

zo = torch.ops.zo_core


def arguments(count: int = 2, k: int = 2, n: int = 40, **changes: object) -> tuple[list, dict]:
    """A valid call of update_; the weights are the first argument."""
    weights = [torch.linspace(-1, 1, n + i) for i in range(count)]
    named = {
        "weights": weights,
        "hessians": [],
        "tensor_ids": list(range(count)),
        "offsets": [],
        "streams": torch.arange(k),
        "coeffs": torch.full((k, count), 1e-2),
    }
    options = {"seed": 1, "distribution": "gaussian", "counters": torch.zeros(1 + count, dtype=torch.int64)}
    for name, value in changes.items():
        (named if name in named else options)[name] = value
    return list(named.values()), options


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_opcheck(distribution):
    args, options = arguments(distribution=distribution)
    torch.library.opcheck(zo.update_.default, args, options)
    full = options | {"decay": torch.full((2,), 0.1), "update": torch.tensor(3)}
    torch.library.opcheck(zo.update_.default, args, full)
    hessians = [torch.ones_like(t) for t in args[0]]
    extra = {name: torch.full((2, 2), 0.1) for name in ("restore", "curvature")} | {"smoothing": torch.zeros(2)}
    torch.library.opcheck(zo.update_.default, [args[0], hessians, *args[2:]], full | extra)
    if distribution == "gaussian":
        torch.library.opcheck(zo.update_.default, args, full | {"squares": torch.full((2, 2), 0.1)})
    dst = [torch.empty_like(t, dtype=torch.bfloat16) for t in args[0]]
    torch.library.opcheck(zo.perturb.default, [args[0], dst, *args[1:]], full)
    kept = {"residuals": [torch.ones(40, dtype=torch.int8), torch.empty(0, dtype=torch.int16)]}
    weights = [args[0][0].bfloat16(), args[0][1]]
    torch.library.opcheck(zo.update_.default, [weights, *args[1:]], full | kept)
    torch.library.opcheck(zo.perturb.default, [weights, dst, *args[1:]], full | kept)
    factors = {"row_scales": [torch.ones(5), torch.ones(41)], "column_scales": [torch.ones(8), torch.empty(0)]}
    torch.library.opcheck(zo.update_.default, args, full | factors)
    torch.library.opcheck(zo.perturb.default, [args[0], dst, *args[1:]], full | factors)
    key = {"seed": 1, "domain": 0, "tensor_id": 0, "stream": 0, "block": 0}
    torch.library.opcheck(zo.philox_.default, [torch.empty(3, 4, dtype=torch.int32)], key)


def buffer(n: int) -> Tensor:
    return torch.zeros(n)


def kept(*residuals: Tensor, dtype: torch.dtype = torch.bfloat16) -> dict:
    return {"weights": [torch.zeros(40), torch.zeros(41, dtype=dtype)], "residuals": list(residuals)}


def scaled(rows: object = 6, columns: object = 7, **others: object) -> dict:
    """Scales of the second of two tensors, of 40 and 41 elements: tensors, or how many ones."""
    row, column = (torch.ones(x) if isinstance(x, int) else x for x in (rows, columns))
    return {"row_scales": [torch.ones(40), row], "column_scales": [torch.empty(0), column], **others}


SHARED = buffer(100)
NONE, BYTES = torch.empty(0, dtype=torch.int8), torch.zeros(82, dtype=torch.int8)
WRONG = {
    "dtype": (
        {"weights": [torch.zeros(40), torch.zeros(41, dtype=torch.float64)]},
        TypeError,
        r"weights\[1\].*float64",
    ),
    "integer weights": ({"weights": [torch.zeros(40), torch.zeros(41).int()]}, TypeError, r"weights\[1\].*int32"),
    "device": ({"weights": [torch.zeros(40), torch.zeros(41, device="meta")]}, ValueError, r"weights\[1\].*cpu.*meta"),
    "layout": (
        {"weights": [torch.zeros(40), torch.zeros(4, 5).t()]},
        ValueError,
        r"weights\[1\].*contiguous.*\(5, 4\)",
    ),
    "the same tensor twice": ({"weights": [SHARED, SHARED]}, ValueError, r"weights\[0\] and weights\[1\] overlap"),
    "overlapping views": ({"weights": [SHARED[:60], SHARED[59:]]}, ValueError, r"overlap"),
    "too few ids": ({"tensor_ids": [0]}, ValueError, r"tensor_ids: expected 2 .* got 1"),
    "negative id": ({"tensor_ids": [0, -1]}, ValueError, r"tensor_ids.*got -1"),
    "id too large": ({"tensor_ids": [0, 1 << 32]}, ValueError, r"tensor_ids"),
    "too few offsets": ({"offsets": [0]}, ValueError, r"offsets: expected 2"),
    "negative offset": ({"offsets": [0, -4]}, ValueError, r"offsets.*got -4"),
    "streams of floats": ({"streams": torch.zeros(2)}, TypeError, r"streams: expected torch.int64"),
    "streams of two dimensions": ({"streams": torch.zeros(1, 2).long()}, ValueError, r"streams: expected shape \(2,\)"),
    "coeffs transposed": ({"coeffs": torch.zeros(2, 3)}, ValueError, r"coeffs: expected shape \(2, 2\), got \(2, 3\)"),
    "coeffs in double": ({"coeffs": torch.zeros(2, 2).double()}, TypeError, r"coeffs: expected torch.float32"),
    "decay": ({"decay": torch.zeros(3)}, ValueError, r"decay: expected shape \(2,\), got \(3,\)"),
    "update": ({"update": torch.zeros(2).long()}, ValueError, r"update"),
    "counters": ({"counters": torch.zeros(2).long()}, ValueError, r"counters: expected shape \(3,\), got \(2,\)"),
    "distribution": ({"distribution": "uniform"}, ValueError, r"distribution.*gaussian.*uniform"),
    "too few hessians": ({"hessians": [torch.ones(40)]}, ValueError, r"hessians: expected 2 tensors.*got 1"),
    "hessian shape": ({"hessians": [torch.ones(40), torch.ones(40)]}, ValueError, r"hessians\[1\].*\(41,\).*\(40,\)"),
    "hessian dtype": ({"hessians": [torch.ones(40), torch.ones(41).half()]}, TypeError, r"hessians\[1\].*float16"),
    "part of the hessian form": ({"restore": torch.zeros(2, 2)}, ValueError, r"restore, curvature, smoothing"),
    "squares of signs": (
        {"squares": torch.ones(2, 2), "distribution": "rademacher"},
        ValueError,
        r"squares: expected None",
    ),
    "squares and hessians": (
        {"squares": torch.ones(2, 2), "hessians": [torch.ones(40), torch.ones(41)]},
        ValueError,
        r"squares.*2 hessians",
    ),
    "squares of another shape": ({"squares": torch.ones(1, 2)}, ValueError, r"squares: expected shape \(2, 2\)"),
    "too few residuals": (kept(NONE), ValueError, r"residuals: expected 2 tensors as weights has, got 1"),
    "residual dtype": (
        kept(NONE, torch.zeros(41)),
        TypeError,
        r"residuals\[1\].*int8 or torch.int16, got torch.float32",
    ),
    "residual of float32": (kept(NONE, BYTES[:41], dtype=torch.float32), TypeError, r"residuals\[1\].*float32 weight"),
    "residual shape": (kept(NONE, BYTES[:40]), ValueError, r"residuals\[1\].*\(41,\).*\(40,\)"),
    "residual layout": (kept(NONE, BYTES[::2]), ValueError, r"residuals\[1\].*contiguous"),
    "residual device": (
        kept(NONE, torch.zeros(41, dtype=torch.int8, device="meta")),
        ValueError,
        r"residuals\[1\].*meta",
    ),
    "residuals that overlap": (
        {"weights": [torch.zeros(40).half(), torch.zeros(41).half()], "residuals": [BYTES[:40], BYTES[39:80]]},
        ValueError,
        r"residuals\[0\] and residuals\[1\] overlap",
    ),
    "row scales alone": ({"row_scales": [torch.ones(40), torch.ones(41)]}, ValueError, r"column_scales: expected both"),
    "scales and hessians": (
        scaled(hessians=[torch.ones(40), torch.ones(41)]),
        ValueError,
        r"row_scales, column_scales: expected without hessians",
    ),
    "too few row scales": (
        scaled() | {"row_scales": [torch.ones(40)]},
        ValueError,
        r"row_scales: expected 2 tensors as weights has, got 1",
    ),
    "too few column scales": (scaled() | {"column_scales": [torch.ones(40)]}, ValueError, r"column_scales.*got 1"),
    "row scale dtype": (scaled(torch.ones(6).half()), TypeError, r"row_scales\[1\]: expected torch.float32.*float16"),
    "column scale dtype": (scaled(columns=torch.ones(7).double()), TypeError, r"column_scales\[1\].*float64"),
    "row scale device": (scaled(torch.ones(6, device="meta")), ValueError, r"row_scales\[1\].*cpu.*meta"),
    "column scale layout": (scaled(columns=torch.ones(14)[::2]), ValueError, r"column_scales\[1\].*contiguous"),
    "too few rows": (scaled(5), ValueError, r"row_scales\[1\]: expected 6 numbers or more.*rows? of 7.*41.*got 5"),
    "too few rows for the offset": (scaled(offsets=[0, 2]), ValueError, r"row_scales\[1\]: expected 7 .*43.*got 6"),
    "too few numbers of a vector": (scaled(40, 0), ValueError, r"row_scales\[1\]: expected 41 .*got 40"),
    "row scales that are written": (scaled(SHARED, weights=[SHARED[:40], buffer(41)]), ValueError, r"overlap"),
    "column scales that are written": (scaled(2, SHARED, weights=[SHARED[:40], buffer(41)]), ValueError, r"overlap"),
    "hessian range": ({"hessian_min": 0.0}, ValueError, r"hessian_min"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused_before_anything_is_written(case):
    changes, error, message = WRONG[case]
    args, options = arguments(**changes)
    before = [t.clone() for t in args[0] if t.device.type == "cpu"]
    with pytest.raises(error, match=message):
        zo.update_(*args, **options)
    assert all(torch.equal(a, b) for a, b in zip([t for t in args[0] if t.device.type == "cpu"], before, strict=True))


def test_wrong_destinations_are_refused():
    args, options = arguments()
    src, rest = args[0], args[1:]
    good = [torch.empty_like(t) for t in src]
    whole = torch.zeros(81)
    for dst, error, message in (
        (good[:1], ValueError, r"dst: expected 2 tensors as src has, got 1"),
        ([good[0], torch.empty(40)], ValueError, r"dst\[1\].*\(41,\).*\(40,\)"),
        ([good[0], torch.empty(41).int()], TypeError, r"dst\[1\]"),
        ([good[0], src[1]], ValueError, r"overlap.*update_"),
        ([whole[:40], whole[39:80]], ValueError, r"dst\[0\] and dst\[1\] overlap"),
    ):
        with pytest.raises(error, match=message):
            zo.perturb(src, dst, *rest, **options)
    zo.perturb([whole[:40], whole[:40]], [*good[:1], torch.empty(40)], *rest, **options)  # sources may be shared
    src, shared = [torch.zeros(40).half()] * 2, torch.zeros(40, dtype=torch.int16)
    zo.perturb(src, [torch.empty(40), torch.empty(40)], *rest, **options, residuals=[shared, shared])
    with pytest.raises(ValueError, match=r"residuals\[0\].* overlap"):
        zo.perturb(src, [torch.empty(40), shared.view(torch.float16)], *rest, **options, residuals=[shared, NONE])


def test_scales_may_share_memory_and_a_tensor_without_elements_needs_none():
    args, options = arguments(weights=[torch.zeros(40), torch.zeros(0)])
    zo.update_(*args, **options, row_scales=[SHARED, SHARED[:0]], column_scales=[SHARED, SHARED[:7]])


def test_fakes_check_as_well():
    with FakeTensorMode():
        args, options = arguments()
        zo.update_(*args, **options)
        args, options = arguments(coeffs=torch.zeros(2, 3))
        with pytest.raises(ValueError, match="coeffs"):
            zo.update_(*args, **options)


def test_autograd_sees_that_weights_changed():
    args, options = arguments(**kept(NONE, torch.zeros(41, dtype=torch.int8)))
    written = [*args[0], options["residuals"][1]]
    versions = [t._version for t in written]
    zo.update_(*args, **options)
    assert all(t._version > v for t, v in zip(written, versions, strict=True))
    assert written[2].any()


def test_empty_lists_are_a_no_op():
    args, options = arguments(count=0)
    zo.update_(*args, **options)


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("ZO_CORE_BACKEND", "reference", "False None"),
        ("ZO_CORE_ISA", "portable", "True portable"),
        ("ZO_CORE_ISA", "mmx", "ValueError: ZO_CORE_ISA=mmx: expected one"),
    ],
)
def test_environment_variables(variable, value, expected):
    code = "import zo_core; i = zo_core.backend_info(); print(i['native'], i['isa'])"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, variable: value}, capture_output=True, text=True, check=False
    )
    if "native library" in done.stderr or (value != "reference" and not native.available()):
        pytest.skip("the native library is not built")
    assert expected in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "value"), [("domain", 256), ("tensor_id", -1), ("stream", 1 << 32), ("block", 1 << 56)]
)
def test_philox_refuses_numbers_out_of_range(name, value):
    key = {"seed": 1, "domain": 0, "tensor_id": 0, "stream": 0, "block": 0, name: value}
    with pytest.raises(ValueError, match=name):
        zo.philox_(torch.empty(3, 4, dtype=torch.int32), **key)
