"""zo_core's Triton backend on an emulated GPU: each call says what memory there is and what of it may be written."""

import functools

from triton.runtime import driver as active_driver

from .driver import Emulator


def watch(backend):
    """Make the functions of a module of kernels (``zo_core.kernels.triton``) emulated calls; on any other device they stay.

    The bounds are those of the tensors themselves, also of those that a kernel only has an address of.
    """
    if hasattr(backend.run_pass, "__wrapped__"):
        return

    def watched_call(function, tensors_of):
        @functools.wraps(function)
        def watched(*args, **options):
            gpu = active_driver._active
            if not isinstance(gpu, Emulator) or gpu.in_call:
                return function(*args, **options)
            readable, writable = tensors_of(*args, **options)
            with gpu.call(_named(readable), _named(writable)):
                return function(*args, **options)

        return watched

    def over(name, tensors_of):
        setattr(backend, name, watched_call(getattr(backend, name), tensors_of))

    def over_prepared(name, tensors_of):
        prepare = getattr(backend, name)

        @functools.wraps(prepare)
        def prepared(*args, **beside):
            return watched_call(prepare(*args, **beside), functools.partial(tensors_of, args, beside))

        setattr(backend, name, prepared)

    over("run_pass", _pass)
    over("run_rows", _rows)
    over("philox_", lambda words, **_: ({}, {"words": words}))
    over("signs_", lambda signs, streams, **_: ({"streams": streams}, {"signs": signs}))
    over_prepared("prepare", lambda tensors, beside, **scalars: _pass(*tensors, **beside, **scalars))
    over_prepared("prepare_signs", _signs)


def _named(tensors):
    """(name, tensor) of tensors and of lists of them."""
    for name, value in tensors.items():
        if isinstance(value, list | tuple):
            yield from ((f"{name}[{i}]", t) for i, t in enumerate(value) if hasattr(t, "data_ptr"))
        elif value is not None:
            yield name, value


def _signs(args, beside, out, streams, coeffs, **seed):
    """Tensors of what ``prepare_signs`` returns."""
    return {"streams": streams, "coeffs": coeffs}, {"out": out}


def _pass(
    src, dst, hessians=(), tensor_ids=(), offsets=(), streams=None, coeffs=None, *, counters, curvature=None, residuals=(), **options
):  # fmt: skip
    """Tensors that a pass may read, and those that it may write as well."""
    tensors = {k: v for k, v in options.items() if hasattr(v, "data_ptr") or isinstance(v, list | tuple)}
    readable = {"src": src, "streams": streams, "coeffs": coeffs, "curvature": curvature, **tensors}
    writable = {"dst": dst, "counters": counters}
    moves = any(s.data_ptr() != d.data_ptr() for s, d in zip(src, dst, strict=True))
    (readable if moves else writable)["residuals"] = residuals
    (readable if curvature is None else writable)["hessians"] = hessians
    return readable, writable


def _rows(src, rows, dst, tensor_id, offset, streams, coeffs, *, counters, **options):
    tensors = {k: v for k, v in options.items() if hasattr(v, "data_ptr")}
    return {"src": src, "rows": rows, "streams": streams, "coeffs": coeffs, **tensors}, {
        "dst": dst,
        "counters": counters,
    }
