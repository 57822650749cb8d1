"""Noise version 1 and the fused pass in readable torch.

The truth that every other backend is held against, and the fallback where none is built. Each function takes
what its fast twin takes and is written from docs/noise.md and the equations, not from the fast code.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

GAUSSIAN, RADEMACHER, ROUNDING, HOST, ROWS, COLUMNS = range(6)  # domains
MAX_RANK = 1024  # of factored noise; a block number has room for 2^16
# H of a pass that is not told other limits, in every backend: torch leaves out an argument that equals its schema's
# default when it calls a kernel, so that kernels and schemas must have the same one.
HESSIAN_RANGE = (1e-8, 1e8)
MOMENT_FLOOR = 1e-5  # what a pass with squares adds to the root of the second moment, in every backend
ROUNDS = 7  # of Philox in noise version 1, likewise
CHUNK = 1 << 20  # elements worked on at once: bounds the temporaries, a multiple of every block

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(
    block: Tensor, *, domain: int, tensor_id: int, stream: int | Tensor, seed: int, rounds: int = ROUNDS
) -> Tensor:
    """Philox4x32 words (Salmon et al., SC'11) of the given blocks.

    Args:
        block: int64 block numbers, any shape.
        domain: 0 gaussian, 1 rademacher, 2 stochastic rounding, 3 host-side selection, 4 rows, 5 columns.
        tensor_id: position of the tensor in the optimizer's list.
        stream: number of the probe, or of the update for stochastic rounding.
        seed: 64-bit run seed.
        rounds: 7 is noise version 1; 10 only checks the round loop.

    Returns:
        int64 tensor of block's shape plus a last dimension of 4, values in [0, 2^32).
    """
    c0, c1 = block & _MASK, (block >> 32) & 0xFFFFFF | domain << 24
    c2, c3 = torch.full_like(block, tensor_id), torch.zeros_like(block) + stream & _MASK
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(rounds):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # wrap modulo 2^64: no bit is lost
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return torch.stack((c0, c1, c2, c3), -1)


def philox_(
    words: Tensor, *, domain: int, tensor_id: int, stream: int, block: int, seed: int, rounds: int = ROUNDS
) -> None:
    """Fill int32 ``words`` of shape (n, 4) with the Philox words of blocks ``block`` to ``block + n - 1``."""
    blocks = torch.arange(words.shape[0], device=words.device) + block
    x = philox(blocks, domain=domain, tensor_id=tensor_id, stream=stream, seed=seed, rounds=rounds)
    words.copy_(x - (x >> 31 << 32))


def gaussian(
    element: Tensor, *, tensor_id: int, stream: int | Tensor, seed: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Standard normals of the elements with these int64 indices, computed in ``dtype`` (Box-Muller, 4 a block)."""
    words = philox(element >> 2, domain=GAUSSIAN, tensor_id=tensor_id, stream=stream, seed=seed)
    pair = words.gather(-1, (element & 2).unsqueeze(-1) + torch.arange(2, device=element.device))
    u = (pair[..., 0].float() * 2.0**-32 + 2.0**-33).to(dtype)  # the product is exact: one rounding, as an fma
    signed = pair[..., 1] - (pair[..., 1] >> 31 << 32)
    radius, angle = (-2 * u.log()).sqrt(), signed.to(dtype) * (2 * math.pi * 2.0**-32)
    return radius * torch.where(element & 1 == 0, angle.cos(), angle.sin())


def signs(
    index: Tensor, *, domain: int, tensor_id: int, stream: int | Tensor, seed: int, q: int | Tensor = 0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:  # fmt: skip
    """Signs, +1 or -1, of these int64 indices in a domain: bit i&31 of word (i>>5)&3 of block i>>7 | q<<40."""
    words = philox(index >> 7 | q << 40, domain=domain, tensor_id=tensor_id, stream=stream, seed=seed)
    word = words.gather(-1, (index >> 5 & 3).unsqueeze(-1)).squeeze(-1)
    return ((word >> (index & 31) & 1) * 2 - 1).to(dtype)


def rademacher(
    element: Tensor, *, tensor_id: int, stream: int | Tensor, seed: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Signs of the elements with these int64 indices."""
    return signs(element, domain=RADEMACHER, tensor_id=tensor_id, stream=stream, seed=seed, dtype=dtype)


def _products(element: Tensor, columns: int, rank: int, **key: Any) -> Iterator[Tensor]:
    """a_q(i) b_q(j), q = 0 .. rank - 1, of the elements of a matrix: signs of their rows times signs of their columns."""
    rows, i = torch.unique(element // columns, return_inverse=True)
    places, j = torch.unique(element % columns, return_inverse=True)
    for q in range(rank):
        yield signs(rows, domain=ROWS, q=q, **key)[i] * signs(places, domain=COLUMNS, q=q, **key)[j]


def factored(
    element: Tensor, *, tensor_id: int, stream: int | Tensor, seed: int, columns: int = 0, rank: int = 1,
    dtype: torch.dtype = torch.float64,
) -> Tensor:  # fmt: skip
    """rank^-1/2 sum_q a_q(i) b_q(j) of the elements, in rows of ``columns``; signs of a vector, which has 0 columns."""
    key: dict[str, Any] = {"tensor_id": tensor_id, "stream": stream, "seed": seed, "dtype": dtype}
    if not columns:
        return rademacher(element, **key)
    total: Tensor = torch.stack(list(_products(element, columns, rank, **key))).sum(0)
    return total * float(rank**-0.5)


def columns_of(tensors: Sequence[Tensor]) -> list[int]:
    """Columns that factored noise gives to tensors that are not parts of larger ones: the last dimension, 0 of a vector."""
    return [t.shape[-1] if t.dim() > 1 else 0 for t in tensors]


def signs_(out: Tensor, streams: Tensor, *, domain: int, tensor_id: int, seed: int) -> None:
    """Fill float32 ``out`` of shape (K, rank, n) with the signs of indices 0 to n - 1: of stream k and factor q at [k, q]."""
    rank, n = out.shape[1:]
    index, q = torch.arange(n, device=out.device).expand(out.shape), torch.arange(rank, device=out.device).view(-1, 1)
    out.copy_(signs(index, domain=domain, tensor_id=tensor_id, stream=streams.view(-1, 1, 1), seed=seed, q=q))


def rounding_bits(element: Tensor, *, tensor_id: int, stream: int | Tensor, seed: int) -> Tensor:
    """The 16 random bits, as int64, that round these elements stochastically in update ``stream``."""
    words = philox(element >> 3, domain=ROUNDING, tensor_id=tensor_id, stream=stream, seed=seed)
    word = words.gather(-1, (element >> 1 & 3).unsqueeze(-1)).squeeze(-1)
    return word >> 16 * (element & 1) & 0xFFFF


DISTRIBUTIONS = {"gaussian": gaussian, "rademacher": rademacher, "factored": factored}


def _extended(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The extended pattern of float32 ``x``, as int64: the magnitude's pattern in ``dtype`` and 16 bits below it."""
    magnitude = x.abs()
    pattern = magnitude.view(torch.int32).to(torch.int64)
    if dtype is torch.bfloat16:
        return pattern
    units = (magnitude.double() * 2.0**40).clamp(max=2.0**26).to(torch.int64)  # subnormals: multiples of 2^-24 2^-16
    return torch.where(magnitude < 2.0**-14, units, pattern - (112 << 23) << 3)


def _signed(magnitude: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The number of 16-bit ``dtype`` with this magnitude pattern and the sign of float32 ``x``."""
    pattern = magnitude - (x.signbit().to(torch.int64) << 15)
    return pattern.to(torch.int16).view(dtype)


def stochastic_round(x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 ``x`` to bfloat16 or float16, up with the probability of what truncation drops.

    ``bits`` are 16 random bits an element, aligned with the top of the dropped ones: 16 in bfloat16, 13 in
    float16 and as many more as a subnormal result drops. Infinities and NaN are the caller's to keep.
    """
    return _signed(_extended(x, dtype) + bits >> 16, x, dtype)


def split(
    value: Tensor, dtype: torch.dtype, residual_dtype: torch.dtype, random: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Finite float32 ``value`` as a weight, the nearest number of ``dtype``, and the residual that ``join`` adds to it.

    A residual of 8 bits is rounded: stochastically with the 16 bits an element of ``random``, to nearest without.
    """
    extended = _extended(value, dtype)
    if residual_dtype is torch.int8:
        extended = extended + (0x80 if random is None else random >> 8) >> 8 << 8
    magnitude = extended + 0x8000 >> 16
    residual = extended - (magnitude << 16) >> 16 - torch.iinfo(residual_dtype).bits
    return _signed(magnitude, value, dtype), residual.to(residual_dtype)


def join(weight: Tensor, residual: Tensor) -> Tensor:
    """The float32 value of a weight and its residual. A weight that is not finite has none."""
    magnitude = weight.view(torch.int16).to(torch.int64) & 0x7FFF
    added = residual.to(torch.int64) << 16 - torch.iinfo(residual.dtype).bits
    extended = ((magnitude << 16) + added).clamp(min=0)
    if weight.dtype is torch.bfloat16:
        value = extended.to(torch.int32).view(torch.float32)
    else:
        normal = ((extended >> 3) + (112 << 23)).to(torch.int32).view(torch.float32)
        value = torch.where(extended < 1 << 26, extended.float() * 2.0**-40, normal)
    return torch.where(weight.isfinite(), value.copysign(weight.float()), weight.float())


def scales_of(row_scale: Tensor, column_scale: Tensor, element: Tensor) -> Tensor:
    """float32 scales of these elements of a full tensor: row factor times column factor, an empty one for a vector's 1."""
    if not (n := column_scale.numel()):
        return row_scale.view(-1)[element]
    return row_scale.view(-1)[element // n] * column_scale.view(-1)[element % n]


def _finite(*scalars: Tensor | None) -> bool:
    return all(bool(s.isfinite().all()) for s in scalars if s is not None)


def _works(i: int, *scalars: Tensor | None) -> bool:
    """Whether any of the scalars of tensor i, in the last dimension, is not zero."""
    return any(bool(s[..., i].any()) for s in scalars if s is not None)


@torch.no_grad()
def run_pass(
    src: Sequence[Tensor],
    dst: Sequence[Tensor],
    hessians: Sequence[Tensor],
    tensor_ids: Sequence[int],
    offsets: Sequence[int],
    streams: Tensor,
    coeffs: Tensor,
    *,
    seed: int,
    distribution: str,
    counters: Tensor,
    decay: Tensor | None = None,
    update: Tensor | None = None,
    restore: Tensor | None = None,
    curvature: Tensor | None = None,
    smoothing: Tensor | None = None,
    squares: Tensor | None = None,
    hessian_min: float = HESSIAN_RANGE[0],
    hessian_max: float = HESSIAN_RANGE[1],
    residuals: Sequence[Tensor] = (),
    row_scales: Sequence[Tensor] = (),
    column_scales: Sequence[Tensor] = (),
    rank: int = 1,
    columns: Sequence[int] = (),
) -> None:
    """The operation of docs/noise.md on a list of tensors; arguments as in ``bindings.ops``, already checked."""
    if not _finite(coeffs, decay, restore, curvature, smoothing, squares):
        counters[0] += 1
        return
    columns = columns or columns_of(src)
    for i, (source, target) in enumerate(zip(src, dst, strict=True)):
        in_place = source.data_ptr() == target.data_ptr()
        if in_place and not _works(i, coeffs, restore, curvature, decay, smoothing):
            continue
        first = offsets[i] if offsets else 0
        residual = residuals[i].view(-1) if residuals and residuals[i].numel() else None
        keep = 1 - decay[i] if decay is not None else None
        flat_source, flat_target = source.view(-1), target.view(-1)
        for begin in range(0, source.numel(), CHUNK):
            part = slice(begin, min(begin + CHUNK, source.numel()))
            element = torch.arange(part.start, part.stop, device=source.device) + first
            weight = flat_source[part].float() if residual is None else join(flat_source[part], residual[part])
            hessian = hessians[i].view(-1)[part] if hessians else None
            names = {"tensor_id": tensor_ids[i], "seed": seed}

            noise, back, square = (torch.zeros_like(weight) for _ in range(3))
            for k, stream in enumerate(streams.unbind()):
                key: dict[str, Any] = {"stream": stream, "dtype": torch.float32, **names}
                if distribution == "factored" and columns[i]:
                    c = coeffs[k, i] * torch.tensor(rank**-0.5, dtype=torch.float32, device=coeffs.device)
                    for product in _products(element, columns[i], rank, **key):
                        noise += c * product
                    continue
                z = DISTRIBUTIONS[distribution](element, **key)
                noise += coeffs[k, i] * z
                if restore is not None and curvature is not None:
                    back += restore[k, i] * z
                    square += curvature[k, i] * z * z
                if squares is not None:
                    square += squares[k, i] * z * z
            base = weight
            if hessian is not None:
                if smoothing is not None:
                    base = weight + back / hessian.sqrt()
                    hessian.mul_(1 - smoothing[i] + square).clamp_(hessian_min, hessian_max)
                noise = noise / hessian.sqrt()
            elif row_scales:
                noise = noise * scales_of(row_scales[i], column_scales[i], element)
            elif squares is not None:
                noise = noise / (square.sqrt() + MOMENT_FLOOR)
            out = noise + (base if keep is None else keep * base)

            limit = torch.finfo(target.dtype).max
            beyond = weight.isfinite() & ~(out.abs() <= limit)
            out = torch.where(beyond, torch.where(out.isnan(), weight, out.clamp(-limit, limit)), out)
            out = torch.where(weight.isfinite(), out, weight)
            bits = None
            if update is not None and target.dtype != torch.float32:
                bits = rounding_bits(element, stream=update, **names)
            rounded = out.to(target.dtype)
            if residual is not None and in_place:
                near, rest = split(out, target.dtype, residual.dtype, bits)
                rounded = torch.where(weight.isfinite(), near, rounded)
                residual[part] = rest * weight.isfinite()
            elif bits is not None:
                rounded = torch.where(weight.isfinite(), stochastic_round(out, bits, target.dtype), rounded)
            flat_target[part] = rounded
            counters[1 + i] += beyond.sum()


def run_rows(
    src: Tensor, rows: Tensor, dst: Tensor, tensor_id: int, offset: int, streams: Tensor, coeffs: Tensor, *, seed: int,
    distribution: str, counters: Tensor, residual: Tensor | None = None, hessian: Tensor | None = None,
    row_scale: Tensor | None = None, column_scale: Tensor | None = None, rank: int = 1,
) -> None:  # fmt: skip
    """``perturb`` of the rows of ``src`` that ``rows`` names, into the rows of ``dst``."""
    width = src.shape[1]
    if not width:
        return
    for dst_row, row in zip(dst, rows.tolist(), strict=True):
        run_pass(
            [src[row]], [dst_row], [] if hessian is None else [hessian[row]], [tensor_id], [offset + row * width], streams, coeffs, seed=seed,
            distribution=distribution, counters=counters,
            residuals=[residual[row]] if residual is not None and residual.numel() else (),
            row_scales=() if row_scale is None else [row_scale],
            column_scales=() if column_scale is None else [column_scale], rank=rank, columns=[width],
        )  # fmt: skip
        if not _finite(coeffs):
            return  # counted once
