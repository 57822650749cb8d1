"""Noise version 1 (docs/noise.md) as Triton device functions, and the kernel that fills a tensor with Philox words.

Tensors of noise have the shape of a tile (``passes.py``): (rows, ..., 32), where neighbours along the last axis are
neighbours in memory. Words of Philox are made once a block and laid out by ``join`` and ``reshape`` so that the
elements of a block lie in consecutive registers of one thread: no data moves.
"""

from torch import Tensor

import triton
import triton.language as tl

from ..reference import ROUNDS
from .launch import assembly, kernel, launch, on

GAUSSIAN = tl.constexpr(0 << 24)  # domains, where they are in the counter's second word
RADEMACHER = tl.constexpr(1 << 24)
ROUNDING = tl.constexpr(2 << 24)

RADIUS = tl.constexpr(1.1774100225154747)  # sqrt(2 ln 2): callers scale by it, once a stream and not once a normal

_M0 = tl.constexpr(0xD2511F53)
_M1 = tl.constexpr(0xCD9E8D57)
_W0 = tl.constexpr(0x9E3779B9)
_W1 = tl.constexpr(0xBB67AE85)


@triton.jit
def _product(x, M: tl.constexpr):
    """The 64-bit product of uint32: one IMAD.WIDE, where Triton's own comes with an addition of 0 to its upper word."""
    if assembly() and x.type.is_block():
        return tl.inline_asm_elementwise(f"mul.wide.u32 $0, $1, {M};", "=l,r", [x], tl.uint64, is_pure=True, pack=1)
    else:
        return x.to(tl.uint64) * M


@triton.jit
def philox(c0, c1, c2, c3, k0, k1, ROUNDS: tl.constexpr = 7):
    """The four Philox4x32 words of a counter; all uint32, scalars or tensors.

    Words that are scalars stay so as long as they can: with a scalar c1, c2, c3 a block costs 25 instructions and not
    28. The ANDs cost nothing in SASS, but without them Triton makes the signs of float32 weights twice.
    """
    for _ in tl.static_range(ROUNDS):
        p0 = _product(c0, _M0)
        p1 = _product(c2, _M1)
        c0 = (p1 >> 32).to(tl.uint32) ^ (c1 ^ k0)
        c2 = (p0 >> 32).to(tl.uint32) ^ (c3 ^ k1)
        c1 = (p1 & 0xFFFFFFFF).to(tl.uint32)
        c3 = (p0 & 0xFFFFFFFF).to(tl.uint32)
        k0 = (k0.to(tl.uint64) + _W0).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + _W1).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def words_of(key, stream, lanes, above, BITS: tl.constexpr):
    """Words of blocks of 2^BITS elements: the ``lanes``-th (uint32) from the tile's first, which never carry in 32 bits.

    ``above``: what the counter's second word has above the number of the block.
    """
    first = key.first >> BITS
    high = (first >> 32).to(tl.uint32) | above
    return philox(first.to(tl.uint32) + lanes, high, key.tensor_id, stream, key.k0, key.k1)


@triton.jit
def in_order(x0, x1, x2, x3):
    """The four as one tensor with two more axes of 2: in memory order, x0 to x3 follow each other."""
    return tl.join(tl.join(x0, x2), tl.join(x1, x3))


# ---- intrinsics: on NVIDIA GPUs the approximate ones of the hardware, 1 or 2 instructions each ---------------------


@triton.jit
def _approximate(x, NAME: tl.constexpr):
    return tl.inline_asm_elementwise(f"{NAME}.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _log2(x):
    return _approximate(x, "lg2") if assembly() else tl.log2(x)


@triton.jit
def root(x):
    """sqrt(x), to 1 ulp."""
    return _approximate(x, "sqrt") if assembly() else tl.sqrt(x)


@triton.jit
def rsqrt(x):
    """1 / sqrt(x), to 2 ulp."""
    return _approximate(x, "rsqrt") if assembly() else 1.0 / tl.sqrt(x)


@triton.jit
def inverse(x):
    """1 / x, to 1 ulp."""
    return _approximate(x, "rcp") if assembly() else 1.0 / x


@triton.jit
def _cos(x):
    return _approximate(x, "cos") if assembly() else tl.cos(x)


@triton.jit
def _sin(x):
    return _approximate(x, "sin") if assembly() else tl.sin(x)


# ---- distributions ------------------------------------------------------------------------------------------------


@triton.jit
def _box_muller(even, odd):
    """A pair of normals over RADIUS."""
    u = tl.fma(even.to(tl.float32), 2.0**-32, 2.0**-33)
    # |.| for the sign; next to u = 1 it also holds an approximate logarithm on the wrong side of 0. Free in SASS.
    r = root(tl.abs(_log2(u)))
    phi = odd.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2^32; |phi| <= pi
    return r * _cos(phi), r * _sin(phi)


@triton.jit
def _block_of_normals(key, stream, lanes):
    """Normals of block ``lanes``, along two new axes of 2."""
    w0, w1, w2, w3 = words_of(key, stream, lanes, GAUSSIAN, 2)
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return in_order(z0, z1, z2, z3)


@triton.jit
def gaussian(key, stream, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Standard normals over RADIUS of a tile (1, ROWS, 32), whose first index is a multiple of 32.

    WIDTH: elements a thread has of a row, 4 or 8. It decides only which thread makes which normal.
    """
    lanes = tl.reshape(tl.arange(0, ROWS * (32 // WIDTH)) * (WIDTH // 4), (1, ROWS, 32 // WIDTH)).to(tl.uint32)
    z = _block_of_normals(key, stream, lanes)
    if WIDTH == 8:
        other = _block_of_normals(key, stream, lanes + 1)
        z = tl.permute(tl.join(z, other), (0, 1, 2, 5, 3, 4))
    return tl.reshape(z, (1, ROWS, 32))


@triton.jit
def signs(key, stream, BLOCKS: tl.constexpr, above=RADEMACHER):
    """Words of signs of a Rademacher tile (4, BLOCKS, 32), as uint32 (4, BLOCKS, 1): bit j is element j of the row.

    A thread's four rows are the four words of one block: one Philox gives a thread its 32 signs.
    """
    lanes = tl.arange(0, BLOCKS).to(tl.uint32)
    w0, w1, w2, w3 = words_of(key, stream, lanes, above, 7)
    words = tl.permute(in_order(w0, w1, w2, w3), (1, 2, 0))
    return tl.reshape(words, (4, BLOCKS, 1))


@triton.jit
def signed(words, c, SHAPE: tl.constexpr):
    """C times the signs: the sign bit of c flipped where an element's bit is 0."""
    shift = (31 - tl.arange(0, 32)).to(tl.uint32)[None, None, :]
    minus = tl.broadcast_to(words ^ 0xFFFFFFFF, SHAPE) << shift
    bits = (minus & 0x80000000) ^ c.to(tl.uint32, bitcast=True)
    return bits.to(tl.float32, bitcast=True)


# ---- words --------------------------------------------------------------------------------------------------------

_BLOCKS = tl.constexpr(256)  # of a program


@kernel(warps=4, forms=lambda: [{"ROUNDS": 7}, {"ROUNDS": 10}])
def philox_kernel(words, n, first, skip, tensor_id, number, k0, k1, domain, ROUNDS: tl.constexpr):
    """Raw words of n blocks from ``first + skip``, a row of four each, of stream ``number``; ``first`` is a multiple of the blocks of a program."""
    start = tl.program_id(0).to(tl.int64) * _BLOCKS
    lanes = tl.arange(0, _BLOCKS)
    block = first.to(tl.int64) + start
    high = (block >> 32).to(tl.uint32) & 0xFFFFFF | (domain.to(tl.uint32) << 24)
    w0, w1, w2, w3 = philox(
        block.to(tl.uint32) + lanes.to(tl.uint32), high, tensor_id.to(tl.uint32), number.to(tl.uint32), k0.to(tl.uint32),
        k1.to(tl.uint32), ROUNDS,
    )  # fmt: skip
    row = start + lanes - skip
    at = words + row * 4
    mask = (row >= 0) & (row < n)
    tl.store(at, w0.to(tl.int32, bitcast=True), mask=mask)
    tl.store(at + 1, w1.to(tl.int32, bitcast=True), mask=mask)
    tl.store(at + 2, w2.to(tl.int32, bitcast=True), mask=mask)
    tl.store(at + 3, w3.to(tl.int32, bitcast=True), mask=mask)


def halves(seed: int) -> dict[str, int]:
    """The seed's two words, as kernels take them."""
    return {"k0": seed & 0xFFFFFFFF, "k1": seed >> 32 & 0xFFFFFFFF}


def philox_(
    words: Tensor, *, domain: int, tensor_id: int, stream: int, block: int, seed: int, rounds: int = ROUNDS
) -> None:
    """Fill int32 ``words`` of shape (n, 4) with the Philox words of blocks ``block`` to ``block + n - 1``."""
    if n := words.shape[0]:
        skip = block % _BLOCKS.value  # programs start where block numbers do not carry inside one
        with on(words.device):
            launch(
                philox_kernel, triton.cdiv(skip + n, _BLOCKS.value), words=words, n=n, first=block - skip, skip=skip,
                tensor_id=tensor_id, number=stream, **halves(seed), domain=domain, ROUNDS=rounds,
            )  # fmt: skip
