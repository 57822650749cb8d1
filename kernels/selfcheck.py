"""Known answers: what a backend computes on a device before it is trusted with weights, compared with the reference on the CPU.

Each answer is about one thing that hardware, a driver or a compiler can get wrong, small enough that all of them take
about two seconds once the kernels are compiled. Where float32 sums have one order only, every bit must agree.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import reference

SEED = 0x9E3779B97F4A7C15
ENOUGH = 1 << 11  # elements: two tiles of the Triton backend, the second one of ordinary numbers only

Answer = Callable[[ModuleType, torch.device], None]


class WrongAnswerError(AssertionError):
    """A backend computed something else than the reference; the message says what."""


def run(backend: ModuleType, device: torch.device) -> dict[str, str]:
    """Compute all answers, and return what is wrong: the name of the answer and what differed, or what was raised.

    Args:
        backend: a module with ``run_pass``, ``run_rows``, ``philox_`` and ``signs_``.
        device: where its tensors are.

    Raises:
        torch.OutOfMemoryError: a few megabytes were not free, which says nothing about the backend.
        OSError: nor does a file that cannot be written.
    """
    wrong: dict[str, str] = {}
    with torch.no_grad(), torch.inference_mode(False):
        for name, answer in ANSWERS.items():
            try:
                answer(backend, device)
            except (torch.OutOfMemoryError, OSError):
                raise
            except WrongAnswerError as error:
                wrong[name] = str(error)
            except Exception as error:  # whatever a compiler or a driver raises is the finding
                wrong[name] = f"{type(error).__name__}: {error}"
    return wrong


# ---- what is compared -----------------------------------------------------------------------------------------------


def _uniform(n: int, low: float, high: float, *, key: int = 0) -> Tensor:
    """float32 numbers, the same in every process."""
    return torch.rand(n, generator=torch.Generator().manual_seed(key), dtype=torch.float32) * (high - low) + low


def _weights(dtype: torch.dtype) -> Tensor:
    """ENOUGH weights of many magnitudes, none of them 0; among the first, special numbers."""
    x = (_uniform(ENOUGH, 0.5, 1.0) * torch.exp2(_uniform(ENOUGH, -18.0, 3.0, key=1).round())).to(dtype)
    x[::3] *= -1
    limit = torch.finfo(dtype)
    special = [torch.inf, -torch.inf, torch.nan, limit.max, -limit.max, limit.tiny, limit.tiny / 4, 0.0, -0.0]
    x[5 : 5 + len(special)] = torch.tensor(special, dtype=torch.float32).to(dtype)
    return x


def _residual(bits: int) -> Tensor:
    """ENOUGH residuals, every number of so many bits."""
    whole = torch.arange(ENOUGH, dtype=torch.int64) * 40503 + 7  # odd: all numbers of 16 bits would come, in no order
    return (whole >> 4).to(torch.int8) if bits == 8 else whole.to(torch.int16)


def _pass(
    module: ModuleType, device: torch.device, weights: Tensor, *, into: torch.dtype | None = None, stream: int = 11,
    tensor_id: int = 3, offset: int = 0, coeffs: Tensor | float = 1.0, distribution: str = "rademacher", **options: Any,
) -> list[Tensor]:  # fmt: skip
    """One pass over one tensor: the result, the counters and each tensor of ``options``, all on the CPU."""
    weights = weights.to(device, copy=True)
    dst = weights if into is None else torch.full_like(weights, torch.nan, dtype=into)
    coeffs = torch.as_tensor(coeffs, dtype=torch.float32).reshape(-1, 1).to(device)
    counters = torch.zeros(2, dtype=torch.int64, device=device)

    def move(x: Any) -> Any:
        x = [move(y) for y in x] if isinstance(x, list) else x
        return x.to(device, copy=True) if isinstance(x, Tensor) else x

    moved = {name: move(x) for name, x in options.items()}
    module.run_pass(
        [weights], [dst], moved.pop("hessians", []), [tensor_id], [offset], torch.arange(len(coeffs), device=device) + stream,
        coeffs, seed=SEED, distribution=distribution, counters=counters, **moved,
    )  # fmt: skip
    lists = [x for x in moved.values() if isinstance(x, list)]
    return [t.cpu() for t in (dst, counters, *(t for x in lists for t in x if isinstance(t, Tensor)))]


def _same(what: str, got: Tensor, expected: Tensor, bound: Tensor | float = 0.0) -> None:
    """Raise unless these agree, within a bound, NaN with NaN."""
    x, y = got.double(), expected.double()
    same = (x == y) | (x.isnan() & y.isnan()) | ((x - y).abs() <= bound)
    if not same.all():
        at = int((~same).flatten().nonzero()[0])
        raise WrongAnswerError(
            f"{what}: {int((~same).sum())} of {same.numel()} differ, the first at {at}: expected "
            f"{y.flatten()[at].item():.9g}, got {x.flatten()[at].item():.9g}"
        )


def _as_the_reference(
    backend: ModuleType, device: torch.device, weights: Tensor, *, bound: float = 0.0, **call: Any
) -> None:
    """Raise unless a pass makes what it makes of the reference, in all that it writes."""
    pairs = zip(
        _pass(backend, device, weights, **call), _pass(reference, torch.device("cpu"), weights, **call), strict=True
    )
    for what, (got, expected) in zip(("results", "counters", "what is kept beside"), pairs, strict=False):
        _same(
            f"{str(weights.dtype).removeprefix('torch.')} {what}", got, expected, bound if what != "counters" else 0.0
        )


# ---- the answers ----------------------------------------------------------------------------------------------------


def _words(backend: ModuleType, device: torch.device) -> None:
    key = {"domain": 1, "tensor_id": 2**32 - 7, "stream": 2**31 + 5, "block": 2**32 - 100, "seed": SEED}
    got = torch.full((300, 4), -1, dtype=torch.int32, device=device)
    expected = torch.full((300, 4), -1, dtype=torch.int32)
    backend.philox_(got, **key)
    reference.philox_(expected, **key)
    _same("words", got.cpu(), expected)


def _signs(backend: ModuleType, device: torch.device) -> None:
    _as_the_reference(backend, device, torch.zeros(ENOUGH, dtype=torch.float32), stream=2**32 - 1, tensor_id=2**32 - 2)


def _gaussian(backend: ModuleType, device: torch.device) -> None:
    zeros, element = torch.zeros(4 * ENOUGH, dtype=torch.float32), torch.arange(4 * ENOUGH)
    for coeffs in ([1.0], [0.5, -2.0]):
        got = _pass(backend, device, zeros, coeffs=torch.tensor(coeffs), distribution="gaussian")[0]
        z = [reference.gaussian(element, tensor_id=3, stream=11 + k, seed=SEED) for k in range(len(coeffs))]
        error = got.double() - sum(c * x for c, x in zip(coeffs, z, strict=True))
        size = sum(c * c for c in coeffs) ** 0.5
        rms, largest = float(error.square().mean().sqrt()) / size, float(error.abs().max()) / size
        # docs/noise.md has 1e-6 and 1e-3; the hardware's own bounds reach 1.02e-6 if all errors point one way
        if not (rms <= 1.05e-6 and largest <= 1e-3):
            raise WrongAnswerError(f"sum of {len(coeffs)}: off by {rms:.2e} RMS and {largest:.2e} at most")


def _sixteen_bits(backend: ModuleType, device: torch.device, residual: int = 0, **call: Any) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        kept = [_residual(residual)] if residual else []
        _as_the_reference(backend, device, _weights(dtype), coeffs=0.01, residuals=kept, **call)


def _nearest(backend: ModuleType, device: torch.device) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        _as_the_reference(backend, device, _weights(dtype), coeffs=0.01, into=dtype)


def _stochastic(backend: ModuleType, device: torch.device) -> None:
    _sixteen_bits(backend, device, update=torch.tensor([2**32 + 9]))


def _residual_8(backend: ModuleType, device: torch.device) -> None:
    _sixteen_bits(backend, device, residual=8, update=torch.tensor([4]))


def _residual_16(backend: ModuleType, device: torch.device) -> None:
    _sixteen_bits(backend, device, residual=16, update=torch.tensor([4]))


def _sum(k: int) -> Answer:
    def answer(backend: ModuleType, device: torch.device) -> None:
        coeffs = torch.linspace(0.01, -0.02, k, dtype=torch.float32)
        got = _pass(backend, device, torch.zeros(ENOUGH, dtype=torch.float32), coeffs=coeffs)[0]
        signs = [reference.rademacher(torch.arange(ENOUGH), tensor_id=3, stream=11 + i, seed=SEED) for i in range(k)]
        expected = (torch.stack(signs, 1) * coeffs.double()).sum(1)
        _same("sums", got, expected, 2.0**-22 * 0.02 * k)  # an ulp of the largest coefficient, each

    return answer


def _rows(backend: ModuleType, device: torch.device) -> None:
    shape = 4, ENOUGH // 4 - 24  # rows that start anywhere in a tile
    src, residual = (x[: shape[0] * shape[1]].view(shape) for x in (_weights(torch.bfloat16), _residual(8)))
    rows = torch.tensor([3, 0, 2, 3])

    def gathered(module: ModuleType, device: torch.device) -> Tensor:
        dst = torch.full(shape, torch.nan, dtype=torch.bfloat16, device=device)
        module.run_rows(
            src.to(device), rows.to(device), dst, 5, 2**33 + 3, torch.tensor([2], device=device),
            torch.full((1, 1), 0.01, dtype=torch.float32, device=device), seed=SEED, distribution="rademacher",
            counters=torch.zeros(2, dtype=torch.int64, device=device), residual=residual.to(device),
        )  # fmt: skip
        return dst.cpu()

    _same("rows", gathered(backend, device), gathered(reference, torch.device("cpu")))


def _hessian(backend: ModuleType, device: torch.device) -> None:
    one = torch.ones(1, 1, dtype=torch.float32)
    _as_the_reference(
        backend, device, _uniform(ENOUGH, -1.0, 1.0), coeffs=0.3, hessians=[_uniform(ENOUGH, 0.5, 2.0, key=1)],
        restore=-0.2 * one, curvature=0.3 * one, smoothing=0.1 * one[0], decay=0.05 * one[0], hessian_min=0.7,
        hessian_max=1.9, bound=4e-6,
    )  # fmt: skip


def _moment(backend: ModuleType, device: torch.device) -> None:
    coeffs = torch.tensor([0.01, -0.02, 0.01], dtype=torch.float32)
    _as_the_reference(
        backend, device, _uniform(ENOUGH, -1.0, 1.0), coeffs=coeffs, squares=torch.ones(3, 1, dtype=torch.float32),
        distribution="gaussian", bound=1e-4,
    )  # fmt: skip


def _factors(backend: ModuleType, device: torch.device) -> None:
    _as_the_reference(
        backend, device, _uniform(ENOUGH, -1.0, 1.0), coeffs=0.3, bound=1e-6,
        row_scales=[_uniform(-(-ENOUGH // 24), 0.5, 2.0)], column_scales=[_uniform(24, 0.5, 2.0, key=1)],
    )  # fmt: skip


def _factored(backend: ModuleType, device: torch.device) -> None:
    for k, rank in ((1, 1), (4, 3)):
        coeffs = torch.linspace(0.01, -0.02, k, dtype=torch.float32)
        _as_the_reference(
            backend, device, _uniform(ENOUGH, -1.0, 1.0), coeffs=coeffs, distribution="factored", rank=rank, columns=[24],
            bound=2.0**-22 if rank > 1 else 0.0,
        )  # fmt: skip


def _slice(backend: ModuleType, device: torch.device) -> None:
    _as_the_reference(backend, device, torch.zeros(ENOUGH, dtype=torch.float32), offset=2**39 + 2048 + 77)


def _unaligned(backend: ModuleType, device: torch.device) -> None:
    buffer = torch.full((1500,), 7.0, dtype=torch.float32, device=device)
    counters = torch.zeros(2, dtype=torch.int64, device=device)
    one = torch.ones(1, 1, dtype=torch.float32, device=device)
    view = buffer[33:-35]  # 132 bytes from where memory starts
    backend.run_pass(
        [view], [view], [], [3], [], torch.tensor([11], device=device), one, seed=SEED, distribution="rademacher",
        counters=counters,
    )  # fmt: skip
    expected = torch.full((1500,), 7.0, dtype=torch.float32)
    expected[33:-35] = _pass(reference, torch.device("cpu"), expected[33:-35])[0]
    _same("elements, with those around the view,", buffer.cpu(), expected)


def _not_finite(backend: ModuleType, device: torch.device) -> None:
    _as_the_reference(backend, device, _uniform(ENOUGH, -1.0, 1.0), coeffs=torch.nan)


ANSWERS: dict[str, Answer] = {
    "Philox words": _words,
    "Rademacher signs": _signs,
    "Gaussian bounds": _gaussian,
    "rounding to nearest": _nearest,
    "stochastic rounding": _stochastic,
    "residuals of 8 bits": _residual_8,
    "residuals of 16 bits": _residual_16,
    "sum of 8 streams": _sum(8),
    "sum of 40 streams": _sum(40),
    "gathered rows": _rows,
    "Hessian": _hessian,
    "second moment": _moment,
    "scales in two factors": _factors,
    "factored noise": _factored,
    "slice": _slice,
    "unaligned view": _unaligned,
    "coefficient that is not finite": _not_finite,
}
