"""The weighted sum of the noise of a call's streams over a tile, in one of three ways (``Form.streams``)."""

import triton
import triton.language as tl

from .arguments import Stream
from .factored import products
from .launch import assembly
from .noise import RADIUS, gaussian, signed, signs
from .sums import weighted_signs


@triton.jit
def stream_of(k, column, call, FORM: tl.constexpr):
    """Stream k of the call in a tensor; of a Gaussian, coefficients for normals as ``gaussian`` makes them, over RADIUS."""
    at = k * call.n_tensors + column
    c = tl.load(call.coeffs + at)
    restore, curvature = c, c
    works = c != 0
    if FORM.scale == "update":
        restore, curvature = tl.load(call.restore + at), tl.load(call.curvature + at)
        works = works | (restore != 0) | (curvature != 0)
    if FORM.scale == "moment":
        curvature = tl.load(call.curvature + at)
        works = works | (curvature != 0)
    if FORM.gaussian:
        c, restore, curvature = c * RADIUS, restore * RADIUS, curvature * (RADIUS * RADIUS)
    return Stream(tl.load(call.streams + k).to(tl.uint32), c, restore, curvature, works)


@triton.jit
def _zeros_like(x):
    """Zeros in the registers of x: what a loop carries keeps the layout it starts with, and one that differs from that of
    the noise costs a trip through shared memory for each stream (31 instructions a weight where this costs none).
    """
    if not assembly():
        return tl.zeros_like(x)
    return tl.inline_asm_elementwise("mov.f32 $0, 0f00000000;", "=r,r", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def sum_of_streams(like, key, row, place, mask, only, call, B: tl.constexpr, FORM: tl.constexpr, CAREFUL: tl.constexpr):
    """sum_k c[k] z[k] of a tile of the shape of ``like``, where H changes sum_k restore[k] z[k], and there or with a second moment
    sum_k curvature[k] z[k]^2.

    ``only``: the stream, where the form has one. A careful tile has no sum on the tensor cores, which is of whole tiles.
    """
    A: tl.constexpr = FORM.shape
    noise = _zeros_like(like)
    back = noise
    squares = noise
    if FORM.factored:
        noise = products(row, place, mask, call.made, B, FORM, CAREFUL)
    elif FORM.streams == "sums" and not CAREFUL:
        noise = weighted_signs(key, row.column, call, B)
    else:
        for k in range(1 if FORM.streams == "one" else call.n_streams):
            stream = only
            if FORM.streams != "one":
                stream = stream_of(k, row.column, call, FORM)
            if FORM.streams == "one" or stream.works:
                if FORM.gaussian:
                    z = gaussian(key, stream.number, B, FORM.width)
                    noise = stream.c * z if FORM.streams == "one" else tl.fma(z, stream.c, noise)
                    if FORM.scale == "update":
                        back = tl.fma(z, stream.restore, back)
                    if FORM.scale == "update" or FORM.scale == "moment":
                        squares = tl.fma(z * z, stream.curvature, squares)
                else:
                    words = signs(key, stream.number, B)
                    cz = signed(words, stream.c, (A, B, 32))
                    noise = cz if FORM.streams == "one" else noise + cz
                    if FORM.scale == "update":
                        back += signed(words, stream.restore, (A, B, 32))
                        squares += stream.curvature
    return noise, back, squares
