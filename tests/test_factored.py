"""Factored noise held against its definition in numpy and Python integers, which shares no line with the library."""

from functools import cache

import numpy as np
import pytest
import torch
from conftest import NATIVE
from hypothesis import given
from hypothesis import strategies as st
from zo_core.bindings import native
from zo_core.kernels import reference

import zo_core

SEED = 0x9E3779B97F4A7C15
zo = torch.ops.zo_core


@cache
def words(block: int, domain: int, tensor_id: int, stream: int) -> list[int]:
    """Philox4x32-7 by Python's integers."""
    c = [block & 0xFFFFFFFF, block >> 32 | domain << 24, tensor_id, stream & 0xFFFFFFFF]
    k = [SEED & 0xFFFFFFFF, SEED >> 32]
    for _ in range(7):
        p, r = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [r >> 32 ^ c[1] ^ k[0], r & 0xFFFFFFFF, p >> 32 ^ c[3] ^ k[1], p & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def sign(index: int, domain: int, tensor_id: int, stream: int, q: int = 0) -> int:
    """The sign of one index in a domain (docs/noise.md)."""
    return 1 if words(index >> 7 | q << 40, domain, tensor_id, stream)[index >> 5 & 3] >> (index & 31) & 1 else -1


def moved(
    weights: np.ndarray, columns: int, offset: int, ids: tuple[int, list[int]], coeffs: list[float], rank: int
) -> np.ndarray:
    """The weights of part of a tensor plus its noise, summed in float32 in the order that docs/noise.md gives."""
    tensor_id, streams = ids
    out = weights.copy()
    for n in range(len(weights)):
        i, j = divmod(offset + n, columns or 1)
        total = np.float32(0)
        for stream, c in zip(streams, coeffs, strict=True):
            if not columns:
                total += np.float32(c) * np.float32(sign(offset + n, 1, tensor_id, stream))
                continue
            c = np.float32(c) * np.float32(rank**-0.5)
            for q in range(rank):
                total += c * np.float32(sign(i, 4, tensor_id, stream, q) * sign(j, 5, tensor_id, stream, q))
        out[n] += total
    return out


@given(
    columns=st.one_of(st.integers(0, 9), st.integers(120, 300)),
    offset=st.one_of(st.integers(0, 2**10), st.integers(0, 2**45)),
    n=st.integers(0, 60),
    rank=st.integers(1, 5),
    tensor_id=st.integers(0, 2**32 - 1),
    streams=st.lists(st.integers(0, 2**32 + 5), min_size=1, max_size=4),
)
def test_any_part_of_a_tensor_moves_as_its_definition_says(columns, offset, n, rank, tensor_id, streams):
    weights = np.linspace(-1, 1, n, dtype=np.float32)
    coeffs = [0.03 * (-1) ** k / (k + 1) for k in range(len(streams))]
    expected = moved(weights, columns, offset, (tensor_id, streams), coeffs, rank)
    job = {"seed": zo_core.bindings.ops.signed64(SEED), "distribution": "factored", "rank": rank, "columns": [columns]}
    scalars = torch.tensor(streams), torch.tensor(coeffs).view(-1, 1)
    got = torch.from_numpy(weights.copy())
    zo.update_([got], [], [tensor_id], [offset], *scalars, **job, counters=torch.zeros(2).long())
    assert np.array_equal(got.numpy(), expected)
    other = torch.from_numpy(weights.copy())
    options = job | {"seed": SEED, "counters": torch.zeros(2).long()}
    reference.run_pass([other], [other], [], [tensor_id], [offset], *scalars, **options)
    assert torch.equal(other, got)


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 130), (300, 2), (0, 4), (4, 0)])
def test_factors_make_the_noise(shape):
    streams, rank = torch.tensor([7, 2**32 + 1, -3]), 3
    a, b = zo_core.noise.factors(shape, streams, tensor_id=5, seed=SEED, rank=rank)
    rows, columns = int(np.prod(shape[:-1])), shape[-1]
    assert a.shape == (3, rank, rows) and b.shape == (3, rank, columns) and a.dtype == b.dtype == torch.float32
    for k, stream in enumerate(streams.tolist()):
        z = zo_core.noise.sample("factored", shape, seed=SEED, tensor_id=5, stream=stream, rank=rank)
        made = (a[k].T @ b[k] * rank**-0.5).view(shape)
        assert torch.allclose(z, made, rtol=1e-6, atol=1e-6)
        for q in range(rank):
            assert [sign(i, 4, 5, stream, q) for i in range(min(rows, 200))] == a[k, q, :200].tolist()
            assert [sign(j, 5, 5, stream, q) for j in range(min(columns, 200))] == b[k, q, :200].tolist()


def test_shapes_say_what_is_a_matrix():
    """The last dimension counts columns, all others rows; a vector's signs are Rademacher's, of whatever rank."""
    key = {"seed": SEED, "tensor_id": 1, "stream": 4}
    folded = zo_core.noise.sample("factored", (4, 6, 10), **key)
    assert torch.equal(folded.view(24, 10), zo_core.noise.sample("factored", (24, 10), **key))
    assert not torch.equal(folded.view(4, 60), zo_core.noise.sample("factored", (4, 60), **key))
    vector = zo_core.noise.sample("factored", 60, rank=3, **key)
    assert torch.equal(vector, zo_core.noise.sample("rademacher", 60, **key))
    part = zo_core.noise.sample("factored", 25, offset=17, columns=10, **key)
    assert torch.equal(part, folded.view(-1)[17:42])


@pytest.mark.parametrize("rank", [1, 4])
def test_moments(rank):
    """Mean 0, variance 1, pairwise uncorrelated: five standard deviations, over streams, of an element and of pairs."""
    n = 4096
    a, b = zo_core.noise.factors((8, 8), torch.arange(n), tensor_id=0, seed=SEED, rank=rank)
    z = torch.einsum("kqi,kqj->kij", a, b).view(n, 64) * rank**-0.5
    assert float(z.mean(0).abs().amax()) < 5 / n**0.5
    correlation = z.T @ z / n
    assert float((correlation - torch.eye(64)).abs().amax()) < 5 * (2 if rank > 1 else 1) / n**0.5


@pytest.mark.parametrize("isa", NATIVE, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_sums_of_many_terms_have_the_bits_of_the_reference(isa, dtype):
    """More terms than are summed at a time, some of them zero; blocks with parts of rows; any threads and slices."""
    k, rank, width = 5, 7, 1100
    weights = torch.linspace(-1, 1, 150 * width).to(dtype)
    coeffs = torch.tensor([[0.01], [0.0], [-0.003], [0.7], [1e-5]])
    options = {"seed": SEED, "distribution": "factored", "rank": rank, "columns": [width], "update": torch.tensor(3)}

    def run(backend, begin, end):
        part = weights[begin:end].clone()
        counters = torch.zeros(2).long()
        backend.run_pass([part], [part], [], [4], [begin], torch.arange(k), coeffs, counters=counters, **options)
        return part

    whole = run(reference, 0, len(weights))
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(run(native, 0, len(weights)), whole)
    finally:
        torch.set_num_threads(threads)
    for begin, end in (
        (1, 30_000),
        (777, 20_001),
        (5 * width - 3, 5 * width + 4),
        (2 * width, 3 * width),
        (61 * width + 5, 131 * width),
        (8191, 8192),
    ):
        assert torch.equal(run(native, begin, end), whole[begin:end])


def call(**changes):
    """A valid call of update_ on a matrix and a vector, with changes."""
    weights = [torch.zeros(4, 10), torch.zeros(7)]
    options = {"seed": 1, "distribution": "factored", "counters": torch.zeros(3).long(), **changes}
    zo.update_(weights, options.pop("hessians", []), [0, 1], options.pop("offsets", []), torch.tensor([3]),
               torch.ones(1, 2), **options)  # fmt: skip
    return weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank: expected an integer from 1 to 1024, got 0"),
        ({"rank": 1025}, "rank: expected an integer from 1 to 1024, got 1025"),
        ({"rank": 2, "distribution": "gaussian"}, "rank: expected 1 with distribution 'gaussian', got 2"),
        ({"columns": [10]}, "columns: expected 2 integers, one a tensor, got 1"),
        ({"columns": [10, -1]}, r"columns: expected integers in \[0, 2\^47\), got -1"),
        ({"columns": [10, 2], "offsets": [0, 2**55]}, r"columns\[1\]: expected at most 2\^47 rows"),
        (
            {"hessians": [torch.ones(4, 10), torch.ones(7)], "restore": torch.zeros(1, 2), "curvature": torch.zeros(1, 2),
             "smoothing": torch.zeros(2)},
            "curvature: expected None with distribution 'factored'",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_factors_are_refused_by_name():
    streams = torch.tensor([1])
    with pytest.raises(ValueError, match=r"shape: expected two dimensions or more, got \(5,\)"):
        zo_core.noise.factors((5,), streams, tensor_id=0, seed=1)
    with pytest.raises(ValueError, match="rank: expected an integer from 1"):
        zo_core.noise.factors((5, 2), streams, tensor_id=0, seed=1, rank=0)
    with pytest.raises(ValueError, match=r"signs: expected contiguous float32 of shape \(K, rank, n\)"):
        zo.signs_(torch.zeros(2, 3), streams, seed=1, domain=4, tensor_id=0)
    with pytest.raises(TypeError, match="streams: expected torch.int64"):
        zo.signs_(torch.zeros(1, 1, 3), streams.int(), seed=1, domain=4, tensor_id=0)


def test_schemas_and_fakes():
    job = {"seed": 1, "distribution": "factored", "counters": torch.zeros(2).long(), "rank": 2}
    args = [3], [], torch.tensor([3]), torch.ones(1, 1)
    torch.library.opcheck(zo.update_.default, [[torch.zeros(4, 10)], [], *args], job | {"columns": [10]})
    torch.library.opcheck(zo.perturb.default, [[torch.zeros(4, 10)], [torch.zeros(4, 10)], [], *args], job)
    torch.library.opcheck(
        zo.replay_.default, [[torch.zeros(4, 10)], [3], [], torch.ones(2, 1).long(), torch.ones(2, 1, 1)], job
    )
    rows = torch.zeros(4, 10), torch.tensor([2]), torch.zeros(1, 10), 3, 0, torch.tensor([3]), torch.ones(1, 1)
    torch.library.opcheck(zo.perturb_rows.default, rows, job)
    key = {"seed": 1, "domain": 4, "tensor_id": 0}
    torch.library.opcheck(zo.signs_.default, [torch.zeros(1, 2, 9), torch.tensor([3])], key)
