"""A scale sigma_t for each tensor's probe: a step evaluates at theta_t +- eps sigma_t z_t and moves along sigma_t z_t.

``scales=`` of an optimizer takes them as numbers by name, in a file, or as what ``zo_core.calibrate`` has found. (The diagonal
Hessian of HiZOO, a number for each weight that the method learns itself, is in ``scaling``.)

A file of scales is JSON, one object of tensor name -> sigma; a name may be a pattern, as in ``scales=``:

    {"model.embed_tokens.weight": 0.5, "*.v_proj.weight": 2.0}
"""

import json
import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

Scales = Mapping[str, float] | Sequence[float] | Tensor | str | os.PathLike[str]

RANGE = 1e-6, 1e6  # of a scale: products with eps and lr stay far from where float32 overflows or underflows


def save(scales: Mapping[str, float], path: str | os.PathLike[str]) -> None:
    """Write scales to a file that ``load`` and ``scales=`` read: a JSON object of tensor name (or pattern) -> sigma.

    Raises:
        TypeError, ValueError: a scale that is not a positive finite number.
    """
    found = {_name(name): _positive(f"scales: {name!r}", x) for name, x in scales.items()}
    Path(path).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def load(path: str | os.PathLike[str]) -> dict[str, float]:
    """The scales in a file, as they are there.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON object of positive finite numbers by name.
    """
    what = "expected a JSON object of tensor name -> positive number, as zo_core.scales.save writes it"

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
            raise ValueError(f"{twice!r} is in it twice")
        return found

    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # also of a file that is not UTF-8
        raise ValueError(f"scales: {os.fspath(path)!r}: {what}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"scales: {os.fspath(path)!r}: {what}, got a {type(found).__name__}")
    try:
        return {name: _positive(f"scales: {os.fspath(path)!r}: {name!r}", x) for name, x in found.items()}
    except TypeError as error:
        raise ValueError(str(error)) from None


def kind_of(name: str) -> str:
    """The kind of a tensor by its name: tensors that have one role in different layers are of one kind.

    "norm" for the weights and biases of norms, "bias" for other biases, "embedding"; for all others what follows the number of
    the layer, without further numbers: "self_attn.v_proj" for "model.layers.3.self_attn.v_proj.weight".
    """
    parts = name.split(".")
    if any("norm" in x.lower() or x.lower().startswith("ln_") or x.lower() == "ln" for x in parts):
        return "norm"
    if parts[-1].startswith("bias"):
        return "bias"
    if any("embed" in x.lower() or x in ("wte", "wpe", "shared") for x in parts):
        return "embedding"
    first = next((i for i, x in enumerate(parts) if x.isdigit()), -1)
    rest = [x for x in parts[first + 1 :] if not x.isdigit()]
    return ".".join(rest[:-1] if len(rest) > 1 and rest[-1] == "weight" else rest)


def kinds(params: nn.Module | Iterable[str]) -> dict[str, str]:
    """The kind of each parameter of a module, or of each of these names, by name; see ``kind_of``."""
    names = (n for n, _ in params.named_parameters()) if isinstance(params, nn.Module) else params
    return {name: kind_of(name) for name in names}


def by_kind(params: nn.Module | Iterable[str], values: Mapping[str, float]) -> dict[str, float]:
    """Scales by name from scales by kind; kinds that are not named get 1.

        opt = zo_core.MeZO(model, lr=1e-6, scales=zo_core.scales.by_kind(model, {"norm": 4, "self_attn.v_proj": 2}))

    Raises:
        ValueError: a kind that no tensor is of.
    """
    of = kinds(params)
    _refuse_unknown("kind", [kind for kind in values if kind not in of.values()], sorted(set(of.values())))
    return {name: values[kind] for name, kind in of.items() if kind in values}


def resolve(
    given: Scales | None, names: Sequence[str], sizes: Sequence[int], others: Collection[str] = (), normalize: bool = True
) -> tuple[float, ...]:  # fmt: skip
    """The scale of each tensor, rounded to float32; none of them where all are 1.

    Args:
        given: what ``scales=`` was: numbers by name or pattern (the first that matches a tensor is its scale, without one it
            is 1), the path of a file of these, or one number for each tensor.
        names: of the T tensors.
        sizes: d_t, the number of elements of each.
        others: names that may be given though no tensor has them, as they are frozen ones or second names of tied ones.
        normalize: multiply all of them by one number, so that sum_t d_t sigma_t^2 = sum_t d_t: probes then have the length that
            they have without scales, and ``eps`` and ``lr`` their meaning.

    Raises:
        TypeError, ValueError: no such thing, a name or pattern of no tensor, or a scale that is not a positive finite number in
            ``RANGE``.
        OSError: a file that cannot be read.
    """
    if given is None:
        return ()
    if isinstance(given, str | os.PathLike):
        given = load(given)
    if isinstance(given, Mapping):
        values = _by_name(given, names, others)
    else:
        values = _in_order(given, names)
    if normalize and (total := sum(d * x * x for d, x in zip(sizes, values, strict=True))):
        factor = math.sqrt(sum(sizes) / total)
        values = [x * factor for x in values]
    rounded = tuple(float(np.float32(x)) for x in values)
    for name, x in zip(names, rounded, strict=True):
        if not RANGE[0] <= x <= RANGE[1]:
            how = " after they were multiplied so that sum d sigma^2 = d" * normalize
            raise ValueError(
                f"scales: {name}: expected a number from {RANGE[0]:g} to {RANGE[1]:g}{how}, got {x:g}; to leave a tensor out, freeze "
                "it (requires_grad_(False))"
            )
    return rounded if set(rounded) != {1.0} else ()


def is_one(x: object) -> bool:
    """Whether this is a scale: a number in ``RANGE`` that float32 has."""
    return isinstance(x, float) and RANGE[0] <= x <= RANGE[1] and float(np.float32(x)) == x


def compare(mine: Sequence[float], theirs: Sequence[float], names: Sequence[str]) -> str:
    """What differs between two sets of scales, of which one without any is all 1: a text that names a tensor, "" if nothing does."""
    one, other = (list(x) or [1.0] * len(names) for x in (mine, theirs))
    differ = [n for n, a, b in zip(names, one, other, strict=False) if a != b]
    if not differ:
        return ""
    i = list(names).index(differ[0])
    more = f", and other ones for {len(differ) - 1} more" * (len(differ) > 1)
    return f"expected {one[i]:.9g} for {names[i]}, got {other[i]:.9g}{more}"


def _by_name(given: Mapping[str, float], names: Sequence[str], others: Collection[str]) -> list[float]:
    """The first entry for each tensor, 1 where there is none."""
    pairs = [(_name(key), _positive(f"scales: {key!r}", x)) for key, x in given.items()]
    known = [*names, *others]
    exact, present = dict(pairs), set(known)
    patterns = [key for key, _ in pairs if key not in present]
    unknown = [key for key in patterns if not any(fnmatchcase(name, key) for name in known)]
    _refuse_unknown("tensor", unknown, known)
    if not patterns:
        return [exact.get(name, 1.0) for name in names]
    return [next((x for key, x in pairs if key == name or fnmatchcase(name, key)), 1.0) for name in names]


def _in_order(given: object, names: Sequence[str]) -> list[float]:
    """A number for each tensor."""
    found = given.tolist() if isinstance(given, Tensor | np.ndarray) else given
    if not isinstance(found, list | tuple):
        raise TypeError(
            f"scales: expected numbers by tensor name, the path of a file of them, or one number for each tensor, got {given!r}"
        )
    if len(found) != len(names):
        raise ValueError(f"scales: expected a number for each of the {len(names)} trained tensors, got {len(found)}")
    return [_positive(f"scales: {name}", x) for name, x in zip(names, found, strict=True)]


def _name(key: object) -> str:
    if not isinstance(key, str):
        raise TypeError(f"scales: expected names of tensors, got {key!r}")
    return key


def _positive(what: str, x: object) -> float:
    """The number. TypeError, ValueError unless it is positive and finite."""
    if isinstance(x, bool) or not (isinstance(x, Real) or (isinstance(x, Tensor) and x.numel() == 1)):
        raise TypeError(f"{what}: expected a positive finite number, got {x!r}")
    if not 0 < (value := float(x)) < math.inf:
        raise ValueError(f"{what}: expected a positive finite number, got {value}")
    return value


def _refuse_unknown(what: str, unknown: Sequence[str], known: Sequence[str]) -> None:
    """ValueError if there are any, which says what is near to the first."""
    if unknown:
        near = get_close_matches(unknown[0], known, 1, 0.0)
        raise ValueError(
            f"scales: expected names or patterns of {what}s, none is called {', '.join(map(repr, unknown[:3]))}"
            + (f" (and {len(unknown) - 3} more)" if len(unknown) > 3 else "")
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
