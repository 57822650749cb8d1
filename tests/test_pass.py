"""The operation on lists of tensors: every CPU backend against the equations in float64, and its guarantees."""

import math
from itertools import pairwise

import pytest
import torch
from conftest import NATIVE
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from zo_core.bindings import native
from zo_core.kernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = (1 << 63) + 12345
ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
RESIDUAL = {0: torch.int8, 8: torch.int8, 16: torch.int16}
TINY = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-24}  # spacing of subnormals that matters


def spread(n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Values of many magnitudes, in the subnormal range of float16 as well."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, generator=g) * 10 ** (torch.rand(n, generator=g) * 9 - 8)).to(dtype)


def run(
    backend, src, dst, streams, coeffs, *, hessians=(), ids=None, offsets=(), distribution="gaussian", **options
) -> Tensor:
    """One pass; returns the counters."""
    counters = torch.zeros(1 + len(src), dtype=torch.int64)
    backend.run_pass(
        src, dst, list(hessians), ids or list(range(len(src))), list(offsets), torch.tensor(streams, dtype=torch.int64),
        torch.as_tensor(coeffs, dtype=torch.float32).view(len(streams), len(src)),
        seed=SEED, distribution=distribution, counters=counters, **options,
    )  # fmt: skip
    return counters


def exact(i, src, streams, coeffs, *, offset=0, distribution="gaussian", hessian=None, decay=0.0, restore=None,
          curvature=None, smoothing=0.0, limits=(0.0, math.inf), scale=1.0):  # fmt: skip
    """Tensor i in float64, straight from the equations; also the size of what was summed, for error bounds."""
    element = torch.arange(src.numel()) + offset
    z = [reference.DISTRIBUTIONS[distribution](element, tensor_id=i, stream=s, seed=SEED) for s in streams]

    def total(c):
        return sum(float(c[k]) * z[k] for k in range(len(z)))

    old = hessian.double() if hessian is not None else torch.ones(1).double()
    new = old
    if curvature is not None:
        square = sum(float(curvature[k]) * z[k] ** 2 for k in range(len(z)))
        new = (old * (1 - smoothing + square)).clamp(*limits)
    base = src.double() + (total(restore) / old.sqrt() if restore is not None else 0)
    out = (1 - decay) * base + scale * total(coeffs) / new.sqrt()
    added = coeffs.abs().sum() + (restore.abs().sum() if restore is not None else 0)
    size = src.double().abs() + 10 * added  # |z| < 6.8, and H in the tests is over 0.45
    return out, new, size


def assert_close(got: Tensor, expected: Tensor, size: Tensor, dtype: torch.dtype, stochastic: bool) -> None:
    """Within the float32 arithmetic's error of sums of this size, and one rounding to dtype."""
    rounding = {False: 0.5, True: 1.0}[stochastic] * (ULP[dtype] * expected.abs() + TINY[dtype])
    rounding = rounding if dtype != torch.float32 else 0
    assert bool(((got.double() - expected).abs() <= 4e-7 * size + 1.01 * rounding).all())


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dst_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("src_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["plain", "scaled", "hessian update"])
def test_the_operation(backend, form, src_dtype, dst_dtype, stochastic, distribution):
    sizes, offsets, ids = [0, 1, 127, 128, 3001, 20], [0, 5, 0, 2**33 + 3, 77, 1], [0, 1, 2, 3, 4, 5]
    src = [spread(n, src_dtype, n) for n in sizes]
    dst = [torch.full_like(t, math.nan, dtype=dst_dtype) for t in src]
    streams, n = [0, 9, 2**32 - 1], len(sizes)
    coeffs = torch.tensor(
        [[1e-3, 1e-2, 0.0, 3e-6, 1e-3, 0.0], [0.0, 2e-3, 0.0, 1e-3, -1e-3, 0.0], [1e-4] * 4 + [0.5, 0.0]]
    )
    decay = torch.tensor([0.0, 0.1, 0.0, 0.01, 0.0, 0.5])
    hessians, extra = [], {}
    if form != "plain":
        hessians = [torch.rand(k, generator=torch.Generator().manual_seed(k)) + 0.5 for k in sizes]
    if form == "hessian update":
        extra = {"restore": 0.5 * coeffs, "curvature": 0.1 * coeffs.abs(), "smoothing": torch.linspace(0, 0.3, n)}
    before = [h.clone() for h in hessians]
    limits = {"hessian_min": 0.45, "hessian_max": 1.4} if extra else {}
    counters = run(
        backend, src, dst, streams, coeffs, hessians=hessians, ids=ids, offsets=offsets, distribution=distribution,
        decay=decay, update=torch.tensor(6) if stochastic else None, **extra, **limits,
    )  # fmt: skip
    for i in range(n):
        column = {k: v[:, i] for k, v in extra.items() if v.dim() == 2}
        expected, new_hessian, size = exact(
            i, src[i], streams, coeffs[:, i], offset=offsets[i], distribution=distribution, decay=float(decay[i]),
            hessian=before[i] if hessians else None, **column,
            smoothing=float(extra["smoothing"][i]) if extra else 0.0, limits=(0.45, 1.4) if extra else (0, math.inf),
        )  # fmt: skip
        assert_close(dst[i], expected, size, dst_dtype, stochastic)
        if hessians:
            assert torch.allclose(hessians[i].double(), new_hessian.expand(sizes[i]), rtol=1e-5, atol=0)
    assert not counters.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_in_two_factors_go_by_the_index_in_the_full_tensor(backend, dtype):
    """Shards of a matrix take the factors of the whole; a vector has a factor for each element."""
    rows, columns, cut = torch.linspace(0.5, 1, 33), torch.linspace(1, 0.7, 97), (0, 1, 130, 2049, 33 * 97 - 5)
    whole, coeffs = spread(cut[-1], dtype), torch.tensor([[0.01], [-0.02]])
    expected, _, size = exact(
        0, whole, [5, 6], coeffs[:, 0], scale=torch.outer(rows.double(), columns.double()).view(-1)[: cut[-1]]
    )
    vector = torch.outer(rows, columns).view(-1)
    for row, column in ((rows.view(-1, 1), columns), (vector, torch.empty(0))):
        parts = [whole[a:b].clone() for a, b in pairwise(cut)]
        for part, offset in zip(parts, cut, strict=False):
            run(
                backend, [part], [part], [5, 6], coeffs, ids=[0], offsets=[offset], row_scales=[row],
                column_scales=[column],
            )  # fmt: skip
        assert_close(torch.cat(parts), expected, size, dtype, stochastic=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_is_the_same_as_into_another_tensor(backend, dtype):
    src, options = (
        [spread(5000, dtype), spread(77, dtype, 1)],
        {"update": torch.tensor(3), "decay": torch.tensor([0.1, 0.0])},
    )
    dst = [torch.empty_like(t) for t in src]
    run(backend, src, dst, [1, 2], [[0.1, 0.2], [0.3, 0.0]], **options)
    run(backend, src, src, [1, 2], [[0.1, 0.2], [0.3, 0.0]], **options)
    assert all(torch.equal(a, b) for a, b in zip(src, dst, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("update", [None, torch.tensor(4)], ids=["nearest", "stochastic"])
def test_a_slice_gets_what_the_whole_tensor_gets(backend, dtype, update):
    whole = spread(4321, dtype)
    parts = [whole[a:b].clone() for a, b in ((0, 1), (1, 130), (130, 2049), (2049, 4321))]
    guarded = torch.full((4321 + 64,), 7.0, dtype=dtype)  # an unaligned view, with something to overwrite around it
    guarded[31 : 31 + 4321] = whole
    run(backend, [whole], [whole], [5, 6], [[0.01], [0.02]], update=update)
    view = guarded[31 : 31 + 4321]
    run(backend, [view], [view], [5, 6], [[0.01], [0.02]], update=update)
    for part, offset in zip(parts, (0, 1, 130, 2049), strict=True):
        run(backend, [part], [part], [5, 6], [[0.01], [0.02]], ids=[0], offsets=[offset], update=update)
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(view, whole)
    assert bool((guarded[:31] == 7).all()) and bool((guarded[31 + 4321 :] == 7).all())


def test_tensors_left_out_are_not_read_or_written(backend):
    kept, left_out = spread(300, torch.float32), torch.full((300,), math.nan)
    before = left_out.view(torch.int32).clone()
    run(backend, [left_out, kept], [left_out, kept], [1, 2], [[0.0, 0.5], [0.0, 0.5]], ids=[0, 1])
    assert torch.equal(left_out.view(torch.int32), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["coeffs", "decay", "restore", "curvature", "smoothing"])
def test_a_non_finite_scalar_is_a_counted_no_op(backend, where, bad):
    weights, hessian = [spread(500, torch.bfloat16), spread(5, torch.bfloat16)], [torch.ones(500), torch.ones(5)]
    before = [t.clone() for t in weights + hessian]
    options = {k: torch.full((1, 2), 0.1) for k in ("coeffs", "restore", "curvature")}
    options |= {k: torch.full((2,), 0.1) for k in ("decay", "smoothing")}
    options[where].view(-1)[-1] = bad
    coeffs = options.pop("coeffs")
    counters = run(backend, weights, weights, [1], coeffs, hessians=hessian, update=torch.tensor(0), **options)
    assert counters.tolist() == [1, 0, 0]
    assert all(torch.equal(a, b) for a, b in zip(weights + hessian, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("update", [None, torch.tensor(4)], ids=["nearest", "stochastic"])
def test_results_beyond_the_range_saturate_and_are_counted(backend, dtype, update):
    limit = torch.finfo(dtype).max
    weights = torch.tensor([limit, -limit, 1.0, math.inf, -math.inf, math.nan, limit] * 37).to(dtype)
    before = weights.clone()
    signs = reference.rademacher(torch.arange(weights.numel()), tensor_id=0, stream=1, seed=SEED)
    counters = run(backend, [weights], [weights], [1], [[limit / 2]], distribution="rademacher", update=update)
    beyond = before.isfinite() & (before.double() * signs == limit)
    assert counters.tolist() == [0, int(beyond.sum())]
    assert torch.equal(weights[beyond], before[beyond])
    special = ~before.isfinite()
    assert torch.equal(weights[special].isnan(), before[special].isnan())
    assert torch.equal(weights[before.isinf()], before[before.isinf()])
    assert bool(weights[before.isfinite()].isfinite().all())


def test_every_16_bit_value_survives_a_pass_that_adds_nothing(backend):
    for dtype in (torch.bfloat16, torch.float16):
        for update in (None, torch.tensor(1)):
            values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
            out = torch.empty_like(values)
            run(backend, [values], [out], [], [], update=update)
            assert torch.equal(out.isnan(), values.isnan())
            assert torch.equal(out[~out.isnan()], values[~values.isnan()])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_nearest_is_torch_s_rounding_bit_for_bit(backend, dtype):
    g = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(1 << 31), 1 << 31, (200_000,), generator=g, dtype=torch.int64).to(torch.int32)
    halves = (torch.arange(0, 1 << 15, dtype=torch.int32) << 16).view(torch.float32)[
        :0x7F80
    ]  # bf16 values: ties of f16
    subnormal = torch.arange(0, 1 << 12).float() * 2.0**-26  # quarters of float16's spacing
    x = torch.cat((patterns.view(torch.float32), halves, subnormal, -subnormal))
    x = x[x.abs() <= torch.finfo(dtype).max]
    out = torch.empty_like(x, dtype=dtype)
    run(backend, [x], [out], [], [])
    assert torch.equal(out, x.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_stochastic_rounding_is_the_reference_bit_for_bit(backend, dtype):
    x = torch.cat((spread(50_000, torch.float32), torch.arange(0, 5000).float() * 2.0**-31, torch.tensor([0.0, -0.0])))
    x = torch.cat((x, x * 1e-3, -x))
    out = torch.empty_like(x, dtype=dtype)
    run(backend, [x], [out], [], [], update=torch.tensor(2**32 - 1))
    bits = reference.rounding_bits(torch.arange(x.numel()), tensor_id=0, stream=2**32 - 1, seed=SEED)
    assert torch.equal(out, reference.stochastic_round(x, bits, dtype))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_weight_is_its_value_rounded_and_the_residual_holds_the_rest(dtype, bits):
    patterns = torch.randint(-(1 << 31), 1 << 31, (200_000,), generator=torch.Generator().manual_seed(0))
    x = torch.cat(
        (patterns.to(torch.int32).view(torch.float32), spread(100_000, torch.float32), torch.tensor([0.0, -0.0]))
    )
    x = x[x.abs() <= torch.finfo(dtype).max]
    weight, residual = reference.split(x, dtype, RESIDUAL[bits])
    value = reference.join(weight, residual)
    spacing = torch.exp2(x.abs().clamp(min=torch.finfo(dtype).smallest_normal).log2().floor().double()) * ULP[dtype]
    error = {8: 0.5, 16: 1.0 if dtype == torch.float16 else 0.0}[bits] * 2.0**-bits * spacing
    assert bool(((value.double() - x.double()).abs() <= error * 1.001).all())
    assert torch.equal(value.signbit(), x.signbit())
    assert torch.equal((weight.double() - value.double()).abs(), (value.to(dtype).double() - value.double()).abs())
    again = reference.split(value, dtype, RESIDUAL[bits])
    assert torch.equal(weight, again[0]) and torch.equal(residual, again[1])


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_pair_of_weight_and_residual_has_a_value_next_to_the_weight(backend, dtype, bits):
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    before = torch.zeros(every.shape)
    for r in (-(1 << bits - 1), -77, -1, 0, 1, 77, (1 << bits - 1) - 1):
        residual, value = torch.full(every.shape, r, dtype=RESIDUAL[bits]), torch.empty(every.shape)
        run(backend, [every], [value], [], [], residuals=[residual])
        expected = reference.join(every, residual)
        assert torch.equal(value.isnan(), every.isnan()) and torch.equal(value.isnan(), expected.isnan())
        assert torch.equal(value.nan_to_num(0), expected.nan_to_num(0))
        assert torch.equal(expected.isinf(), every.isinf())
        assert torch.equal(expected[~every.isnan()].signbit(), every[~every.isnan()].signbit())
        size = expected.abs()[every.isfinite()]
        assert bool((size >= before[every.isfinite()]).all())  # in the order of the residuals
        before = expected.abs()
        if r == 0:
            assert torch.equal(size, every.float().abs()[every.isfinite()])
        near = every.isfinite() & (every.abs() < torch.finfo(dtype).max)
        weight, value = every[near].double(), expected[near].double()
        assert torch.equal((weight - value).abs(), (expected[near].to(dtype).double() - value).abs())


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("form", ["plain", "hessian update"])
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_the_operation_on_values(backend, stochastic, form, distribution):
    kinds = [(t, bits) for t in DTYPES for bits in (0, 8, 16) if bits == 0 or t != torch.float32]
    sizes = [700 + 13 * i for i in range(len(kinds))]
    src = [spread(n, t, n) for n, (t, _) in zip(sizes, kinds, strict=True)]
    residuals = [
        torch.randint(-100, 100, (n if bits else 0,), dtype=RESIDUAL[bits])
        for n, (_, bits) in zip(sizes, kinds, strict=True)
    ]
    values = [reference.join(w, r) if r.numel() else w.float().clone() for w, r in zip(src, residuals, strict=True)]
    coeffs = torch.tensor([[1e-3, -1e-2, 1e-5, 0.0, 0.3, 2e-4, 1e-4], [1e-3, 0.0, 1e-6, 0.3, 1e-3, 1e-3, 1e-4]])
    decay, extra, hessians, limits = torch.linspace(0, 0.1, 7), {}, [], (0.45, 1.4)
    if form != "plain":
        hessians = [torch.linspace(0.5, 1.3, n) for n in sizes]
        extra = {"restore": 0.5 * coeffs, "curvature": 0.1 * coeffs.abs(), "smoothing": torch.linspace(0, 0.3, 7)}
        extra |= {"hessian_min": limits[0], "hessian_max": limits[1]}
    before, offsets = [h.clone() for h in hessians], [3 * i for i in range(7)]
    dst = [torch.empty(n) for n in sizes]
    options = {"offsets": offsets, "distribution": distribution, "decay": decay}
    if not hessians:
        run(backend, src, dst, [3, 4], coeffs, residuals=residuals, **options)
    counters = run(
        backend, src, src, [3, 4], coeffs, hessians=hessians, residuals=residuals, **options, **extra,
        update=torch.tensor(8) if stochastic else None,
    )  # fmt: skip
    for i, (dtype, bits) in enumerate(kinds):
        names = {k: v[:, i] for k, v in extra.items() if k in ("restore", "curvature")}
        expected, _, size = exact(
            i, values[i], [3, 4], coeffs[:, i], offset=offsets[i], distribution=distribution, decay=float(decay[i]),
            hessian=before[i] if hessians else None, smoothing=float(extra["smoothing"][i]) if extra else 0.0,
            limits=limits if extra else (0, math.inf), **names,
        )  # fmt: skip
        got = reference.join(src[i], residuals[i]) if bits else src[i].float()
        unit = (ULP[dtype] * expected.abs() + TINY[dtype]) * 2.0**-bits if dtype != torch.float32 else 0
        assert bool(((got.double() - expected).abs() <= 4e-7 * size + 1.01 * unit).all()), (dtype, bits)
        if not hessians:
            assert_close(dst[i], expected, size, torch.float32, False)
    assert not counters.any()


@pytest.mark.parametrize("bits", [0, 8, 16])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_small_updates_add_up(backend, dtype, bits):
    """1000 of 2^-19 on 1.0, far below half a unit of the weight: lost without a residual or random bits."""
    weights = [torch.ones(3000, dtype=dtype)]
    options = {"residuals": [torch.zeros(3000, dtype=RESIDUAL[bits])]} if bits else {}
    for step in range(1000 if backend is not reference else 50):
        run(
            backend,
            weights,
            weights,
            [7],
            [[2.0**-19]],
            distribution="rademacher",
            update=torch.tensor(step),
            **options,
        )
    z = reference.rademacher(torch.arange(3000), tensor_id=0, stream=7, seed=SEED)
    value = reference.join(weights[0], options["residuals"][0]) if bits else weights[0].float()
    moved, expected = float(((value - 1) * z).mean()), 2.0**-19 * (step + 1)
    unit = ULP[dtype] * 2.0**-bits
    assert abs(moved - expected) <= (0 if bits == 16 else 5 * math.sqrt(expected * unit / 3000))


def test_a_residual_that_the_c_interface_cannot_use_is_refused():
    if not native.available():
        pytest.skip(f"the native library is {native.why_missing}")
    for weights, residual in ((torch.zeros(3), torch.int8), (torch.zeros(3).half(), torch.int32)):
        with pytest.raises(RuntimeError, match="zo_run refused"):
            run(native, [weights], [weights], [1], [[0.1]], residuals=[torch.zeros(3, dtype=residual)])


@given(
    value=st.floats(-60000, 60000) | st.floats(-1e-4, 1e-4) | st.floats(-6e-8, 6e-8),
    dtype=st.sampled_from(DTYPES[1:]),
)
def test_stochastic_rounding_is_unbiased_between_the_two_neighbours(value, dtype):
    n = 1 << 16
    x = torch.full((n,), value)
    value = float(x[0])
    out = torch.empty_like(x, dtype=dtype)
    run(native if native.available() else reference, [x], [out], [], [], update=torch.tensor(9))
    got = out.double()
    spacing = max(2.0 ** (math.frexp(value)[1] - 1) * ULP[dtype], TINY[dtype], 2.0**-133)
    assert float((got - value).abs().amax()) < spacing  # never past a neighbour
    assert abs(float(got.mean()) - value) <= 5 * spacing / 2 / math.sqrt(n) + spacing * 2.0**-13  # 13 random bits


@given(data=st.data())
def test_any_mask_is_the_sum_of_its_parts(data):
    """Streams that a zero coefficient leaves out of a tensor change nothing, in any pattern."""
    k, t = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=k * t, max_size=k * t))).view(k, t)
    coeffs = torch.where(mask, torch.linspace(0.1, 1, k * t).view(k, t), 0.0)
    sizes = data.draw(st.lists(st.integers(0, 300), min_size=t, max_size=t))
    backend = native if native.available() else reference
    together = [torch.zeros(n) for n in sizes]
    run(backend, together, together, list(range(k)), coeffs, distribution="rademacher")
    for i, n in enumerate(sizes):
        alone = torch.zeros(n)
        for j in range(k):
            if mask[j, i]:
                run(backend, [alone], [alone], [j], coeffs[j, i].view(1, 1), ids=[i], distribution="rademacher")
        assert torch.allclose(together[i], alone, atol=1e-6)


def test_a_pass_and_its_opposite_return_within_an_ulp_in_float32(backend):
    before = torch.linspace(-1, 1, 9999)
    weights = before.clone()
    run(backend, [weights], [weights], [3], [[1e-3]])
    run(backend, [weights], [weights], [3], [[-1e-3]])
    assert float((weights - before).abs().amax()) <= 2.0**-23


def test_threads_do_not_change_a_bit():
    if not native.available():
        pytest.skip(f"the native library is {native.why_missing}")
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        weights = [spread(n, torch.bfloat16, n) for n in (700_001, 3, 400_000)]
        weights[0][::100], weights[2][::1000] = (torch.finfo(torch.bfloat16).max,) * 2
        residuals = [torch.empty(0, dtype=torch.int8), *(torch.ones_like(t, dtype=torch.int8) for t in weights[1:])]
        counters = run(
            native, weights, weights, [1, 2], [[1e38, 0.1, 1e38]] * 2, update=torch.tensor(5), residuals=residuals
        )
        results.append([*weights, *residuals, counters])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))
    assert counters[1] > 1000 and counters[2] == 0 and counters[3] > 1000


def test_the_number_of_threads_is_torch_s(monkeypatch):
    if not native.available():
        pytest.skip(f"the native library is {native.why_missing}")
    weights = [torch.zeros(3)]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 0)  # which no pass can run on
    with pytest.raises(RuntimeError, match="zo_run refused"):
        run(native, weights, weights, [1], [[0.1]])


@pytest.mark.parametrize("isa", NATIVE, indirect=True)
@pytest.mark.parametrize("dst_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "unaligned"])
def test_copies_that_go_past_the_caches_are_those_that_do_not(isa, dst_dtype, shift):
    n, piece = (9 << 20) // dst_dtype.itemsize + 5, 1 << 20
    src = torch.randn(n, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    rest = torch.arange(n).to(torch.int8)
    got, expected = (torch.empty(n + shift, dtype=dst_dtype)[shift:] for _ in range(2))
    options = {"distribution": "rademacher", "ids": [4]}
    run(native, [src], [got], [7], [1e-3], residuals=[rest], **options)
    for at in range(0, n, piece):
        part = slice(at, at + piece)
        run(native, [src[part]], [expected[part]], [7], [1e-3], residuals=[rest[part]], offsets=[at], **options)
    assert torch.equal(got, expected) and not torch.equal(got, src.to(dst_dtype))
