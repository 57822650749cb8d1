"""The assembly of kernels/triton/residuals.py, statement by statement in numpy, against the reference: no GPU is needed."""

import re

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from zo_core.kernels import reference
from zo_core.kernels.triton import residuals


def run(text, *inputs):
    """Outputs, uint32, of inline assembly: those places that it writes; ``inputs`` stand behind them."""
    outputs = len(set(re.findall(r"\w+ (\$\d),", text)))
    places = {f"${outputs + i}": x.astype(np.int64) for i, x in enumerate(inputs)}

    def byte(x, i):
        return x >> 8 * i & 0xFF

    def signed(x, bits):
        return x - ((x >> (bits - 1) & 1) << bits)

    def dot(kind, a, b, c):
        name, which, bits = re.match(r"dp(\da)\.?(lo|hi)?\.(?:u|s)32\.(u|s)32", kind).groups()
        sign = signed if bits == "s" else lambda x, _: x
        if name == "4a":
            return c + sum(sign(byte(a, i), 8) * sign(byte(b, i), 8) for i in range(4))
        first = 2 * (which == "hi")
        return c + sum(sign(a >> 16 * i & 0xFFFF, 16) * sign(byte(b, first + i), 8) for i in range(2))

    def prmt(a, b, order):
        return sum(byte(b if (n := order >> 4 * i & 0xF) > 3 else a, n & 3) << 8 * i for i in range(4))

    def fma(a, b, c):
        halves = [(x[:, None] >> np.array([0, 16]) & 0xFFFF) for x in np.broadcast_arrays(a, b, c)]
        x, y, z = (torch.from_numpy(h.astype(np.int16)).view(torch.bfloat16).double() for h in halves)
        out = (x * y + z).bfloat16()
        bits = torch.where(out.isnan(), 0x7FFF, out.view(torch.int16).int() & 0xFFFF).numpy().astype(np.int64)
        return bits[:, 0] | bits[:, 1] << 16

    simple = {"mov": lambda a: a, "shl": lambda a, n: a << n, "shr": lambda a, n: a >> n, "and": lambda a, b: a & b,
              "add": lambda a, b: a + b, "prmt": prmt, "fma": fma}  # fmt: skip
    for statement in re.sub(r"\{|\}|\.reg[^;]*;", "", text).split(";"):
        if not statement.strip():
            continue
        kind, rest = statement.split(None, 1)
        target, *names = rest.replace(" ", "").split(",")
        values = [places[n] if n in places else np.int64(int(n, 0)) for n in names]
        work = simple.get(kind.split(".")[0])
        places[target] = (dot(kind, *values) if work is None else work(*values)) & 0xFFFFFFFF
    return [places[f"${i}"].astype(np.uint32) for i in range(outputs)]


def packed(x, dtype):
    """Neighbours of x in words, least first: a column of uint32 for each register."""
    return list(np.ascontiguousarray(x.reshape(-1, 4).numpy().astype(dtype)).view(np.uint32).T)


def unpacked(columns, dtype):
    return torch.from_numpy(np.ascontiguousarray(np.stack(columns, 1)).view(dtype).ravel().copy())


def test_widen():
    weights = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    out = [x for word in packed(weights, np.int16) for x in run(residuals._WIDEN.value, word)]
    assert torch.equal(unpacked(out, np.int32), weights.view(torch.bfloat16).float().view(torch.int32))


@pytest.mark.parametrize("bits", [8, 16])
def test_join(bits):
    g = torch.Generator().manual_seed(1)
    weights = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).repeat(4)
    ends = torch.tensor([-(1 << (bits - 1)), (1 << (bits - 1)) - 1])
    some = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (1 << 17,), generator=g)
    rests = torch.cat((ends.repeat_interleave(1 << 16), some)).to(torch.int8 if bits == 8 else torch.int16)
    w, r = packed(weights, np.int16), packed(rests, np.int8 if bits == 8 else np.int16)
    if bits == 8:
        out = run(residuals._JOIN_8.value, *w, *r)
    else:
        out = [x for i in range(2) for x in run(residuals._JOIN_16.value, w[i], r[i])]
    got, expected = unpacked(out, np.float32), reference.join(weights.view(torch.bfloat16), rests)
    below_zero = (weights & 0x7FFF == 0) & (rests < 0)
    assert got[below_zero | ~expected.isfinite()].isnan().all()
    plain = ~below_zero & expected.isfinite()
    assert torch.equal(got[plain].view(torch.int32), expected[plain].view(torch.int32))


@pytest.mark.parametrize(("bits", "stochastic"), [(16, False), (8, False), (8, True)])
def test_split(bits, stochastic):
    g = torch.Generator().manual_seed(2)
    limit = torch.tensor(torch.finfo(torch.bfloat16).max).view(torch.int32)
    x = torch.randint(0, int(limit) + 1, (1 << 16,), generator=g).to(torch.int32)
    x[:2048] = torch.arange(2048) << 5
    x[2048:4096] = limit - (torch.arange(2048, dtype=torch.int32) << 5)
    x = torch.stack((x, x | -(1 << 31)), 1).ravel().view(torch.float32)
    random = torch.randint(0, 1 << 16, x.shape, generator=g)
    registers = packed(x, np.float32)
    if bits == 16:
        first, second = (run(residuals._SPLIT_16.value, *registers[i : i + 2]) for i in (0, 2))
        out = [first[0], second[0]], [first[1], second[1]]
    elif stochastic:
        *weights, rest = run(residuals._SPLIT_8_STOCHASTIC.value, *registers, *packed(random, np.uint16))
        out = weights, [rest]
    else:
        *weights, rest = run(residuals._SPLIT_8.value, *registers)
        out = weights, [rest]
    dtype = torch.int8 if bits == 8 else torch.int16
    expected = reference.split(x, torch.bfloat16, dtype, random if stochastic else None)
    assert torch.equal(unpacked(out[0], np.int16), expected[0].view(torch.int16))
    assert torch.equal(unpacked(out[1], np.int8 if bits == 8 else np.int16), expected[1])
