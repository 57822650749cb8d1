"""The Triton backend held against the reference.

Without a GPU it runs in a process of its own, in Triton's interpreter (``TRITON_INTERPRET=1 pytest tests/test_triton.py``) or
as compiled for a GPU, in the emulator (``ZO_CORE_PTX=90 pytest tests/test_triton.py``).
"""

import pytest
import torch
from conftest import TRITON_ON_CPU

pytest.importorskip("triton", reason="triton is not installed")
if not TRITON_ON_CPU and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 or ZO_CORE_PTX=90 in a process of its own", allow_module_level=True)

import triton
import triton.language as tl
from cases import SEED, Case, run
from zo_core.bindings import ops
from zo_core.kernels import reference
from zo_core.kernels import triton as backend
from zo_core.kernels.triton import factored as factored_kernels
from zo_core.kernels.triton import forms, passes, places, table

DEVICE = "cpu" if TRITON_ON_CPU else "cuda"


def sample(distribution: str, n: int, *, offset: int = 0, stream: int = 5, k: int = 1, slot: int = 0) -> torch.Tensor:
    """z of n elements: added to zeros with coefficient 1 in stream ``slot`` of k, all others 0."""
    out, coeffs = torch.zeros(n, device=DEVICE), torch.zeros(k, 1, device=DEVICE)
    coeffs[slot] = 1
    streams = torch.arange(100, 100 + k, device=DEVICE)
    streams[slot] = stream
    backend.run_pass(
        [out], [out], [], [3], [offset], streams, coeffs, seed=SEED, distribution=distribution,
        counters=torch.zeros(2, dtype=torch.int64, device=DEVICE),
    )  # fmt: skip
    return out


@pytest.mark.parametrize(
    "key",
    [
        {"block": 0, "domain": 0, "tensor_id": 0, "stream": 0, "seed": 0},
        {"block": 2**32 - 100, "domain": 2, "tensor_id": 2**32 - 1, "stream": 2**31, "seed": SEED},
        {"block": 2**55 + 77, "domain": 3, "tensor_id": 5, "stream": 2**32 - 1, "seed": 2**64 - 1},
    ],
)
@pytest.mark.parametrize("rounds", [7, 10])
def test_words_are_those_of_the_reference(key, rounds):
    for n in (0, 1, 300):
        got, expected = (torch.full((n, 4), -1, dtype=torch.int32, device=DEVICE) for _ in range(2))
        backend.philox_(got, rounds=rounds, **key)
        reference.philox_(expected, rounds=rounds, **key)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_a_pass_is_its_equation(distribution):
    weights = torch.linspace(-1, 1, 2000, device=DEVICE)
    z = torch.stack([sample(distribution, 2000, stream=s) for s in (4, 9)])
    coeffs, decay = torch.tensor([[0.01], [-0.02]], device=DEVICE), torch.tensor([0.1], device=DEVICE)
    expected = passes.reference(weights, z, coeffs[:, 0], 0.1)
    backend.run_pass(
        [weights], [weights], [], [3], [], torch.tensor([4, 9], device=DEVICE), coeffs, seed=SEED, distribution=distribution,
        decay=decay, counters=torch.zeros(2, dtype=torch.int64, device=DEVICE),
    )  # fmt: skip
    assert torch.allclose(weights, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_noise_is_within_its_bound_and_bit_identical_whatever_slice_streams_and_tile(distribution, monkeypatch):
    n = 3000
    whole = sample(distribution, n)
    exact = reference.DISTRIBUTIONS[distribution](torch.arange(n, device=DEVICE), tensor_id=3, stream=5, seed=SEED)
    error = whole.double() - exact
    bounds = (1e-6, 1e-3) if distribution == "gaussian" else (0, 0)
    assert error.square().mean().sqrt() <= bounds[0] and error.abs().max() <= bounds[1]
    for begin, end in [(1, 2), (3, 131), (127, 129), (1023, 2049), (1024, n)]:
        assert torch.equal(sample(distribution, end - begin, offset=begin), whole[begin:end])
    for k, slot in [(2, 1), (9, 4)]:
        assert torch.equal(sample(distribution, n, k=k, slot=slot), whole)
    monkeypatch.setattr(table, "tiles_of", lambda form: 1)
    passes._prepared.clear()
    assert torch.equal(sample(distribution, n), whole)


def test_offsets_across_a_block_number_of_32_bits():
    for distribution, bits in (("gaussian", 34), ("rademacher", 39)):
        offset = 2**bits - 1500
        got = sample(distribution, 3000, offset=offset)
        at = torch.arange(3000, device=DEVICE) + offset
        exact = reference.DISTRIBUTIONS[distribution](at, tensor_id=3, stream=5, seed=SEED)
        assert (got.double() - exact).abs().max() <= 1e-3


def test_a_pass_is_prepared_once_and_again_when_a_tensor_moves():
    passes._prepared.clear()
    job = run(Case(sizes=(5, 2000), k=2), backend, DEVICE)
    (made,) = passes._prepared.values()
    (tables,) = made.values()
    backend.run_pass(*job["args"], seed=SEED, distribution="gaussian", **job["options"])
    assert [id(x) for x in passes._prepared.values()] == [id(made)] and [id(x) for x in made.values()] == [id(tables)]
    weights = job["args"][0]
    weights[0] = weights[0].clone()
    backend.run_pass(weights, weights, *job["args"][2:], seed=SEED, distribution="gaussian", **job["options"])
    assert len(passes._prepared) == 2


@pytest.mark.parametrize(
    "part", ["src", "dst", "hessians", "residuals", "ids", "offsets", "row", "column", "columns", "widths"]
)
def test_whatever_the_table_holds_makes_another_one(part):
    t = [torch.zeros(4, device=DEVICE, dtype=torch.bfloat16) for _ in range(4)]
    t += [torch.ones(4, device=DEVICE) for _ in range(7)]
    t += [torch.zeros(4, device=DEVICE, dtype=torch.int8) for _ in range(2)]
    of = {"src": [t[0]], "dst": [t[1]], "hessians": [t[4]], "residuals": [t[11]], "ids": [0], "offsets": [0]}
    of |= {"row_scales": [t[5]], "column_scales": [t[6]], "widths": [4]}
    other = {
        "src": [t[2]],
        "dst": [t[3]],
        "hessians": [t[7]],
        "residuals": [t[12]],
        "ids": [1],
        "offsets": [4],
        "widths": [2],
    }
    other |= {"row": [t[8]], "column": [t[9]], "columns": [t[6][:2]]}
    name = {"row": "row_scales", "column": "column_scales", "columns": "column_scales"}.get(part, part)
    form = forms.form_of("factored", torch.bfloat16, torch.bfloat16, "factors", 8, False, False, False, 1)
    kinds = [table.Tensors.of(**of), table.Tensors.of(**of | {name: other[part]})]
    tables = [table.table_of(tensors, [0], form, t[0].device).rows for tensors in kinds]
    assert kinds[0] != kinds[1] and not torch.equal(*tables)


def test_the_passes_that_are_kept_are_bounded(monkeypatch):
    monkeypatch.setattr(passes, "PREPARED", 3)
    passes._prepared.clear()
    kept = [torch.zeros(1, device=DEVICE) for _ in range(6)]
    nothing = torch.zeros(0, dtype=torch.int64, device=DEVICE), torch.zeros(0, 1, device=DEVICE)
    counters = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    for t in kept:
        backend.run_pass([t], [t], [], [0], [0], *nothing, seed=1, distribution="gaussian", counters=counters)
    assert len(passes._prepared) == 3


def test_rows_and_runs_of_the_table():
    tile = forms.TILE
    rows, tiles, _, _ = table.tile_rows(
        [64, 128, 192], [64, 130, 192], [0, 0, 0], [48, 0, 200], [tile * 3 + 1, 0, 5], [0, 0, tile + 136], [4, 5, 6], [0, 1, 2],
        2, 2, 8,
    )  # fmt: skip
    assert rows[0] == [64, 64, 0, 0, tile * 3 + 1, 0, 4, 1, 48, *[0] * 6]
    back = [192 - 272, 192 - 272, 0, 136, 141, tile, 6, 5, 200 - 136]  # 136 elements into the second tile
    assert rows[1] == back + [0] * 6 and tiles == [4, 1]
    assert table.runs_of([4, 1, 5], 2).tolist() == [[0, 0], [0, 2], [1, 0], [2, 0], [2, 2], [2, 4]]
    assert table.runs_of([], 2).shape == (0, 2)


@pytest.mark.parametrize(("bits", "alignment"), [(0, 1), (8, 8), (16, 16)])
def test_eight_residuals_are_aligned_to_their_size(bits, alignment):
    for at in range(2 * alignment):
        rows = table.tile_rows([64], [64], [0], [at], [9], [0], [0], [3], 2, 2, bits)[0]
        assert rows[0][7] == 6 + (at % alignment == 0)


@pytest.mark.parametrize(
    ("factors", "aligned"),
    [
        ((4, 64, 8), True),
        ((4, 68, 8), False),
        ((4, 64, 12), False),
        ((0, 64, 16), True),
        ((0, 68, 16), False),
        ((0, 64, 1 << 28), False),  # places in whole tiles have 32 bits
    ],
)
def test_factors_of_columns_are_read_at_once_where_whole_groups_of_them_are_in_a_row(factors, aligned):
    rows = table.tile_rows([64], [64], [0], [0], [9], [3], [0], [3], 2, 2, 0, [factors])[0]
    rows += table.tile_rows([74], [74], [0], [0], [9], [5], [0], [3], 2, 2, 0, [factors])[0]
    assert [r[7] for r in rows] == [6, 6 + aligned] and all(tuple(r[9:12]) == factors for r in rows)


@triton.jit
def places_kernel(numbers, out, n: tl.constexpr):
    columns, at = tl.load(numbers + 1), tl.arange(0, n)
    place = places.place_in(tl.load(numbers), columns, True)
    down = places.rows_down(place, at)
    tl.store(out + at, place.line + down)
    tl.store(out + n + at, place.column + at - down * columns)


@pytest.mark.parametrize(
    "columns", [1, 2, 3, 8, 24, 100, 511, 1000, 1016, 1023, 1024, 1025, 1032, 4096, 2**31 + 8, 2**62]
)
def test_rows_and_columns_are_those_of_a_division(columns):
    ends = range(0, 2 * columns, max(columns // 7, 1)) if columns < 2**40 else (0,)
    for e in {max(x + d, 0) for x in (*ends, 2**56 // columns * columns) for d in (0, -1, -700, -1023)}:
        out = torch.empty(2, forms.TILE, dtype=torch.int64, device=DEVICE)
        places_kernel[(1,)](torch.tensor([e, columns], device=DEVICE), out, forms.TILE)
        at = torch.arange(forms.TILE, device=DEVICE) + e
        assert torch.equal(out, torch.stack((at // columns, at % columns))), e


def test_a_tensor_of_more_than_2_31_elements_has_int64_rows_and_runs():
    n = 2**33 + 3
    rows, tiles, _, _ = table.tile_rows([2**40], [2**40], [0], [0], [n], [2**35 + 1], [0], [0], 2, 2, 0)
    assert rows[0][4] == n + 1 and tiles == [-(-(n + 1) // forms.TILE)]
    assert table.runs_of(tiles, 62)[-1].tolist() == [0, (tiles[0] - 1) // 62 * 62]


CALLS = [("gaussian", 1), ("gaussian", 2), ("rademacher", 1), ("rademacher", 9)]
ROWS = [  # with each width and each call, every number of bits of a residual
    (width, *call, (0, 8, 16)[(i + j) % 3])
    for i, width in enumerate((3, 130, 1024, 1500))
    for j, call in enumerate(CALLS)
]


@pytest.mark.parametrize(("width", "distribution", "k", "bits"), ROWS)
def test_gathered_rows_are_those_of_the_whole_matrix(width, distribution, k, bits):
    g = torch.Generator().manual_seed(1)
    src = torch.randn(12, width, generator=g).to(DEVICE, torch.bfloat16)
    rest = torch.randint(-100, 100, (12, width) if bits else (0,), generator=g)
    rest = (rest << bits // 2).to(DEVICE, torch.int16) if bits == 16 else rest.to(DEVICE, torch.int8)
    rows = torch.tensor([7, 0, 11, 7], device=DEVICE)
    streams, coeffs = torch.arange(k, device=DEVICE), torch.linspace(0.01, -0.02, k, device=DEVICE)[:, None]
    key = {"seed": SEED, "distribution": distribution, "counters": torch.zeros(2, dtype=torch.int64, device=DEVICE)}
    whole, got = torch.empty_like(src), torch.full((4, width), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    reference.run_pass([src], [whole], [], [5], [2**33 + 3], streams, coeffs, residuals=[rest], **key)
    backend.run_rows(src, rows, got, 5, 2**33 + 3, streams, coeffs, residual=rest, **key)
    assert not got.isnan().any() and ((got - whole[rows]).float().abs() <= 2.0**-7 * whole[rows].float().abs()).all()
    assert (got != whole[rows]).float().mean() <= 0.02
    expected = torch.empty_like(got)
    reference.run_rows(src, rows, expected, 5, 2**33 + 3, streams, coeffs, residual=rest, **key)
    assert torch.equal(expected, whole[rows])


@pytest.mark.parametrize("columns", [None, 0, 1, 8, 104, 1032])
@pytest.mark.parametrize(
    ("distribution", "k", "width"), [("gaussian", 1, 130), ("gaussian", 1, 1504), ("rademacher", 1, 1024)]
)
def test_gathered_rows_with_scales_are_those_of_the_whole_matrix(distribution, k, width, columns):
    """Columns None: a Hessian; 0: a factor an element."""
    src = torch.linspace(-1, 1, 9 * width, device=DEVICE).view(9, width)
    rows = torch.tensor([7, 0, 8], device=DEVICE)
    streams, coeffs = torch.arange(k, device=DEVICE), torch.linspace(0.01, -0.02, k, device=DEVICE)[:, None]
    key = {"seed": SEED, "distribution": distribution, "counters": torch.zeros(2, dtype=torch.int64, device=DEVICE)}
    whole, got = torch.empty_like(src), torch.full((3, width), torch.nan, device=DEVICE)
    g = torch.Generator().manual_seed(1)
    if columns is None:
        hessian = (torch.rand(src.shape, generator=g) + 0.5).to(DEVICE)
        of_whole, of_rows = {"hessians": [hessian]}, {"hessian": hessian}
    else:
        row = (torch.rand(-(-(1024 + src.numel()) // (columns or 1)), generator=g) + 0.5).to(DEVICE)
        column = (torch.rand(columns, generator=g) + 0.5).to(DEVICE)
        of_whole = {"hessians": [], "row_scales": [row], "column_scales": [column]}
        of_rows = {"row_scale": row, "column_scale": column}
    reference.run_pass([src], [whole], of_whole.pop("hessians"), [5], [1024], streams, coeffs, **of_whole, **key)
    backend.run_rows(src, rows, got, 5, 1024, streams, coeffs, **of_rows, **key)
    assert torch.allclose(got, whole[rows], rtol=1e-6, atol=1e-6)


def test_gathered_rows_with_a_coefficient_that_is_not_finite_are_a_counted_no_op():
    src, dst = torch.ones(3, 5, device=DEVICE), torch.zeros(2, 5, device=DEVICE)
    rows, streams = torch.tensor([2, 1], device=DEVICE), torch.tensor([1], device=DEVICE)
    for module in (backend, reference):
        counters = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        coeffs = torch.full((1, 1), torch.nan, device=DEVICE)
        module.run_rows(src, rows, dst, 0, 0, streams, coeffs, seed=1, distribution="gaussian", counters=counters)
        assert counters.tolist() == [1, 0] and not dst.any()


def both(weights, rests, decay, into, update):
    """What a pass without noise makes of weights and residuals, by the backend and by the reference."""
    made = []
    for module in (backend, reference):
        w, r, counters = weights.clone(), rests.clone(), torch.zeros(2, dtype=torch.int64, device=DEVICE)
        dst = torch.full_like(w, torch.nan, dtype=into) if into else w
        streams, coeffs = torch.zeros(0, dtype=torch.int64, device=DEVICE), torch.zeros(0, 1, device=DEVICE)
        module.run_pass(
            [w], [dst], [], [1], [], streams, coeffs, seed=SEED, distribution="gaussian", counters=counters,
            decay=torch.full((1,), decay, device=DEVICE), residuals=[r],
            update=torch.tensor([3], device=DEVICE) if update else None,
        )  # fmt: skip
        nan = dst.isnan()
        made.append([nan, dst.where(~nan, 1.5), r, counters])
    return zip(*made, strict=True)


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("bits", [0, 8, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_weight_with_residuals_that_no_pass_makes_too(dtype, bits, update):
    weights = torch.arange(-(1 << 15), 1 << 15, device=DEVICE).to(torch.int16).view(dtype)
    rests = torch.zeros(0, dtype=torch.int8, device=DEVICE)
    if bits:
        ends = torch.tensor([-(1 << (bits - 1)), -1, (1 << (bits - 1)) - 1], device=DEVICE)
        # neighbours differ, and each weight meets each residual: 2^16 is no multiple of 3
        rests = ends.to(torch.int8 if bits == 8 else torch.int16).repeat(1 << 16)
        weights = weights.repeat(len(ends))
    for into, decay in ((torch.float32, 0.0), (None, 0.3)):
        assert all(torch.equal(x, y) for x, y in both(weights, rests, decay, into, update)), (into, decay)


def test_saturated_elements_are_counted_for_their_tensor_whatever_launch_it_is_in():
    limit = {t: torch.finfo(t).max for t in (torch.bfloat16, torch.float16)}
    weights = [torch.full((n,), limit[t], dtype=t, device=DEVICE) for n, t in
               ((5, torch.bfloat16), (2000, torch.float16), (0, torch.bfloat16), (1030, torch.bfloat16))]  # fmt: skip
    rests = [torch.zeros(w.shape if i != 0 else 0, dtype=torch.int8, device=DEVICE) for i, w in enumerate(weights)]
    counters = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    coeffs = torch.full((1, 4), 1e36, device=DEVICE)
    backend.run_pass(
        weights, weights, [], [0, 1, 2, 3], [], torch.tensor([1], device=DEVICE), coeffs, seed=SEED,
        distribution="rademacher", counters=counters, residuals=rests,
    )  # fmt: skip
    up = [int((reference.rademacher(torch.arange(w.numel()), tensor_id=i, stream=1, seed=SEED) > 0).sum())
          for i, w in enumerate(weights)]  # fmt: skip
    assert counters.tolist() == [0, up[0], 2000, 0, up[3]]  # no float16 is as large as the noise
    assert not any(r.any() for r in rests[1:2])


def test_a_prepared_pass_is_the_reference_s(monkeypatch):
    src = [torch.linspace(-1, 1, 300, device=DEVICE), torch.linspace(0, 2, 5, device=DEVICE)]
    found = []
    for module in (backend, reference):
        monkeypatch.setattr(ops, "backend_for", lambda device, module=module: module)
        out, counters = [torch.empty_like(t) for t in src], torch.zeros(3, dtype=torch.int64, device=DEVICE)
        run = ops.prepare(counters.device, src, out, hessians=[], tensor_ids=[1, 4], offsets=[])
        streams, coeffs = torch.tensor([3], device=DEVICE), torch.full((1, 2), 0.5, device=DEVICE)
        run(src, streams=streams, coeffs=coeffs, counters=counters, seed=9, distribution="rademacher")
        found.append(torch.cat(out))
    assert torch.equal(*found) and not torch.equal(found[0], torch.cat(src))


def factored(weights, columns, *, offset=0, rank=1, coeffs=(1.0,), module=backend):
    """Adds factored noise of the streams 4, 5, ... to a part of a matrix."""
    c = torch.tensor(coeffs, device=DEVICE)[:, None]
    module.run_pass(
        [weights], [weights], [], [3], [offset], torch.arange(4, 4 + len(c), device=DEVICE), c, seed=SEED, rank=rank,
        distribution="factored", columns=[columns], counters=torch.zeros(2, dtype=torch.int64, device=DEVICE),
    )  # fmt: skip
    return weights


@pytest.mark.parametrize("columns", [8, 100])
def test_factored_noise_of_any_part_of_a_matrix_is_that_of_the_whole(columns):
    def noise(n, at, **options):
        return factored(torch.zeros(n, device=DEVICE), columns, offset=1024 + at, **options)

    whole = noise(1100, 0, rank=2)
    assert torch.equal(whole, noise(1100, 0, rank=2, module=reference))
    for begin, end in ((175, 177), (100, 400)):  # 1024 + 176 is where a row begins
        assert torch.equal(noise(end - begin, begin, rank=2), whole[begin:end])
    alone = noise(1100, 0, coeffs=[0.0] * 11 + [1.0])
    assert torch.equal(alone.abs(), torch.ones_like(alone))
    assert torch.equal(alone, noise(1100, 0, coeffs=[0.0] * 11 + [1.0, 0.0]))


@pytest.mark.parametrize(("width", "k", "rank"), [(130, 1, 1), (520, 2, 1)])
def test_gathered_rows_with_factored_noise_are_those_of_the_whole_matrix(width, k, rank):
    src = torch.linspace(-1, 1, 9 * width, device=DEVICE).view(9, width)
    rows, got = torch.tensor([7, 0, 8], device=DEVICE), torch.full((3, width), torch.nan, device=DEVICE)
    args = torch.arange(k, device=DEVICE), torch.linspace(0.01, -0.02, k, device=DEVICE)[:, None]
    key = {"seed": SEED, "distribution": "factored", "counters": torch.zeros(2, dtype=torch.int64, device=DEVICE)}
    whole = torch.empty_like(src)
    for offset in (0, 77 * width + 40):
        reference.run_pass([src], [whole], [], [5], [offset], *args, columns=[width], rank=rank, **key)
        backend.run_rows(src, rows, got, 5, offset, *args, rank=rank, **key)
        assert torch.allclose(got, whole[rows], rtol=0, atol=2e-7)


@pytest.mark.parametrize("domain", [1, 4, 5])
def test_signs_are_those_of_the_reference(domain):
    for n in (1, 1100):
        got, expected = (torch.full((2, 3, n), torch.nan, device=DEVICE) for _ in range(2))
        for module, out in ((backend, got), (reference, expected)):
            module.signs_(out, torch.tensor([5, -1], device=DEVICE), domain=domain, tensor_id=2**32 - 3, seed=SEED)
        assert torch.equal(got, expected)


def test_signs_of_many_tensors_are_made_in_one_launch_times_their_coefficients():
    parts = [(4, 7, 0, 1100, 0), (5, 7, 1104, 3, 1), (4, 2**32 - 3, 1120, 40, 1)]
    streams, coeffs = torch.tensor([5, -1], device=DEVICE), torch.tensor([[0.5, 1.0], [0.0, -3.0]], device=DEVICE)
    got, expected = (torch.full((2, 3, 1160), 9.0, device=DEVICE) for _ in range(2))
    backend.prepare_signs(got.device, parts)(got, streams, coeffs, seed=SEED)
    for domain, tensor_id, begin, n, column in parts:
        alone = torch.empty(2, 3, n, device=DEVICE)
        reference.signs_(alone, streams, domain=domain, tensor_id=tensor_id, seed=SEED)
        expected[..., begin : begin + n] = alone * coeffs[:, column, None, None]
    assert torch.equal(got, expected)  # which leaves what is between the parts


def test_only_signs_that_elements_have_are_made():
    """Of rows those that a part of a matrix is in; of columns all, but for a part of one row; two rows are then two parts."""
    programs, (row, column), end = factored_kernels.lines_of(320, 3200 + 5, 640, 9, 2, 16)
    assert programs == [
        [0, 10, 13, 6, 9, 2, 4 << 24, False, False],
        [0, 0, 320, 24, 9, 2, 5 << 24, True, True],
    ]
    assert (row, column, end) == (6, 24, 24 + 320)
    rows, tiles, programs, words = table.tile_rows(
        [1 << 20], [1 << 20], [0], [0], [60], [(1 << 40) - 40], [9], [2], 4, 4, 0, widths=[1 << 40]
    )
    assert [r[4] - r[3] for r in rows] == [40, 20] and [r[0] + 4 * r[3] for r in rows] == [1 << 20, (1 << 20) + 160]
    assert [p[1:3] for p in programs] == [[0, 1], [(1 << 40) - 40, 1 << 40], [1, 2], [0, 20]]
    assert [p[8] for p in programs] == [False, True, False, True] and words == 8 + 40 + 8 + 24 and tiles == [1, 1]
