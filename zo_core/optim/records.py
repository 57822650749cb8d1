"""The data that an optimizer gives a journal and other processes: its identity, its options and the record of each step."""

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..estimators import Estimate
from ..journal import JournalError
from ..record import DTYPES, Identity, Past, Record, TensorInfo
from ..weights import Update

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def identity_of(
    own: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    engine: str,
    padding: Mapping[int, int] = MappingProxyType({}),
) -> Identity:
    """The identity of an optimizer with this state and these groups."""
    kinds: dict[tuple[int, bool], int] = {}
    left, tensors = iter(names), []
    for number, group in enumerate(groups):
        for p in group["params"]:
            rates = kinds.setdefault((number, bool(group["decay_vectors"] or p.ndim > 1)), len(kinds))
            tensors.append(TensorInfo(next(left), tuple(p.shape), _DTYPE_NAMES[p.dtype], rates))
    return Identity(
        method=own["method"], seed=own["seed"], distribution=own["distribution"], rank=own.get("rank", 1),
        residual=own["residual"] or 0, hessian=own["hessian"] or "", engine=engine, tensors=tuple(tensors),
        padding=tuple(padding.items()), scales=own.get("scales", ()),
    )  # fmt: skip


def options_of(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Options of each group, which may be set anew between steps."""
    return {
        f"{name} of group {i}": value.tolist() if isinstance(value, Tensor) else value
        for i, group in enumerate(groups)
        for name, value in group.items()
        if name not in ("params", "param_names")
    }


def facts_of(own: Mapping[str, Any], names: Sequence[str], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """The parts of the state and the properties of the tensors, apart from their values, that must be the same in all processes."""
    facts = {k: own[k] for k in ("seed", "distribution", "residual", "hessian")} | {"rank": own.get("rank", 1)}
    facts |= {k: own[k].tolist() for k in ("stream", "updates", "skipped", "carry")} | {"past": past_of(own["past"])}
    facts["scales"] = own.get("scales", ())
    for i, (name, p) in enumerate(zip(names, parameters, strict=True)):
        facts[f"tensor {i}"] = f"{name}, {str(p.dtype).removeprefix('torch.')} {tuple(p.shape)}"
    return facts


def past_of(past: Past) -> dict[str, Any]:
    """Past probes as lists of numbers."""
    return {"streams": past.streams.tolist(), "coeffs": past.coeffs.tolist(), "steps": past.steps}


def record_of(
    identity: Identity, step: Tensor, found: Estimate, update: Update, lr: Tensor, decay: Tensor, *, stochastic: bool,
    left_out: Collection[int], smoothing: float, past: int = 0,
) -> Record:  # fmt: skip
    """The record of a step. The host waits for the device.

    Args:
        identity: of the optimizer.
        step: int64, one element.
        found: the method's estimate, along K probes.
        update: the pass that it became.
        lr: float32 (T,), learning rate of each tensor.
        decay: float32 (T,), learning rate times weight decay of each tensor.
        stochastic: whether it rounds stochastically.
        left_out: numbers of the tensors that the step leaves out.
        smoothing: of the Hessian, if the step has a curvature.
        past: how many of the probes, the first ones, are those of the steps before.

    Raises:
        JournalError: the probes' streams are not one after the other.
    """
    streams = torch.cat(found.probes).tolist() if found.probes else [0]
    if streams != list(range(streams[0], streams[0] + len(streams))):
        raise JournalError(f"probes: expected streams one after the other, got {streams[:4]}")
    rates = torch.stack((lr, decay)).cpu().numpy()[:, identity.rates]
    curvature = found.curvature if update.curvature is not None else None
    return Record(
        int(step), streams[0], found.coeffs.float().cpu().numpy(), rates[0], rates[1], bool(update.usable), stochastic,
        float(found.loss), frozenset(left_out),
        None if curvature is None else curvature.float().cpu().numpy(), 0.0 if curvature is None else smoothing,
        None if found.carry is None else found.carry.cpu().numpy(), past,
        None if found.squares is None else found.squares.cpu().numpy(),
    )  # fmt: skip
