"""Noise version 1 and the fused pass in readable torch.

The truth that every other backend is held against, and the fallback where none is built. Each function takes
what its fast twin takes and is written from docs/noise.md and the equations, not from the fast code.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

GAUSSIAN, RADEMACHER, ROUNDING, HOST = range(4)  # domains
CHUNK = 1 << 20  # elements worked on at once: bounds the temporaries, a multiple of every block

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(block: Tensor, *, domain: int, tensor_id: int, stream: int | Tensor, seed: int, rounds: int = 7) -> Tensor:
    """Philox4x32 words (Salmon et al., SC'11) of the given blocks.

    Args:
        block: int64 block numbers, any shape.
        domain: 0 gaussian, 1 rademacher, 2 stochastic rounding, 3 host-side selection.
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


def philox_(words: Tensor, *, domain: int, tensor_id: int, stream: int, block: int, seed: int, rounds: int = 7) -> None:
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


def rademacher(
    element: Tensor, *, tensor_id: int, stream: int | Tensor, seed: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Signs, +1 or -1, of the elements with these int64 indices: bit e&31 of word (e>>5)&3 of block e>>7."""
    words = philox(element >> 7, domain=RADEMACHER, tensor_id=tensor_id, stream=stream, seed=seed)
    word = words.gather(-1, (element >> 5 & 3).unsqueeze(-1)).squeeze(-1)
    return ((word >> (element & 31) & 1) * 2 - 1).to(dtype)


def rounding_bits(element: Tensor, *, tensor_id: int, stream: int | Tensor, seed: int) -> Tensor:
    """The 16 random bits, as int64, that round these elements stochastically in update ``stream``."""
    words = philox(element >> 3, domain=ROUNDING, tensor_id=tensor_id, stream=stream, seed=seed)
    word = words.gather(-1, (element >> 1 & 3).unsqueeze(-1)).squeeze(-1)
    return word >> 16 * (element & 1) & 0xFFFF


DISTRIBUTIONS = {"gaussian": gaussian, "rademacher": rademacher}


def stochastic_round(x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 ``x`` to bfloat16 or float16, up with the probability of what truncation drops.

    ``bits`` are 16 random bits an element, aligned with the top of the dropped ones: 16 in bfloat16, 13 in
    float16 and as many more as a subnormal result drops. Infinities and NaN are the caller's to keep.
    """
    pattern = x.view(torch.int32).to(torch.int64) & _MASK
    magnitude, sign = pattern & 0x7FFFFFFF, pattern >> 16 & 0x8000
    if dtype is torch.bfloat16:
        rounded = magnitude + bits >> 16
    else:
        normal = (magnitude + (bits >> 3) >> 13) - (112 << 10)
        units = (x.abs().double() * 2.0**40).clamp(max=2.0**26).to(torch.int64)  # of 2^-40; subnormals: < 2^26
        rounded = torch.where(x.abs() < 2.0**-14, units + bits >> 16, normal)
    rounded = rounded | sign
    return (rounded - (rounded >> 15 << 16)).to(torch.int16).view(dtype)


def _finite(*scalars: Tensor | None) -> bool:
    return all(bool(s.isfinite().all()) for s in scalars if s is not None)


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
    hessian_min: float = 0.0,
    hessian_max: float = math.inf,
) -> None:
    """The operation of docs/noise.md on a list of tensors; arguments as in ``bindings.ops``, already checked."""
    if not _finite(coeffs, decay, restore, curvature, smoothing):
        counters[0] += 1
        return
    for i, (source, target) in enumerate(zip(src, dst, strict=True)):
        first = offsets[i] if offsets else 0
        keep = 1 - decay[i] if decay is not None else None
        flat_source, flat_target = source.view(-1), target.view(-1)
        for begin in range(0, source.numel(), CHUNK):
            part = slice(begin, min(begin + CHUNK, source.numel()))
            element = torch.arange(part.start, part.stop, device=source.device) + first
            weight = flat_source[part].float()
            hessian = hessians[i].view(-1)[part] if hessians else None
            names = {"tensor_id": tensor_ids[i], "seed": seed}

            noise, back, squares = (torch.zeros_like(weight) for _ in range(3))
            for k, stream in enumerate(streams.unbind()):
                z = DISTRIBUTIONS[distribution](element, stream=stream, dtype=torch.float32, **names)
                noise += coeffs[k, i] * z
                if restore is not None and curvature is not None:
                    back += restore[k, i] * z
                    squares += curvature[k, i] * z * z
            base = weight
            if hessian is not None:
                if smoothing is not None:
                    base = weight + back / hessian.sqrt()
                    hessian.mul_(1 - smoothing[i] + squares).clamp_(hessian_min, hessian_max)
                noise = noise / hessian.sqrt()
            out = noise + (base if keep is None else keep * base)

            limit = torch.finfo(target.dtype).max
            beyond = weight.isfinite() & ~(out.abs() <= limit)
            out = torch.where(beyond, torch.where(out.isnan(), weight, out.clamp(-limit, limit)), out)
            out = torch.where(weight.isfinite(), out, weight)
            rounded = out.to(target.dtype)
            if update is not None and target.dtype != torch.float32:
                bits = rounding_bits(element, stream=update, **names)
                rounded = torch.where(weight.isfinite(), stochastic_round(out, bits, target.dtype), rounded)
            flat_target[part] = rounded
            counters[1] += beyond.sum()


def run_rows(
    src: Tensor, rows: Tensor, dst: Tensor, tensor_id: int, offset: int, streams: Tensor, coeffs: Tensor, *, seed: int,
    distribution: str, counters: Tensor,
) -> None:  # fmt: skip
    """``perturb`` of the rows of ``src`` that ``rows`` names, into the rows of ``dst``."""
    width = src.shape[1]
    if not width:
        return
    for dst_row, row in zip(dst, rows.tolist(), strict=True):
        run_pass(
            [src[row]], [dst_row], [], [tensor_id], [offset + row * width], streams, coeffs, seed=seed,
            distribution=distribution, counters=counters,
        )  # fmt: skip
        if not _finite(coeffs):
            return  # counted once
