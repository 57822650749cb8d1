"""A default has one value wherever it can be left out: in the schema of an op, in its checks and in every backend.

torch leaves out a keyword argument that equals the schema's default when it calls a Python kernel, also where the caller gave
it, so what a kernel's own signature says is what holds.
"""

import inspect
from importlib.util import find_spec

import pytest
import torch
from zo_core.bindings import native, ops
from zo_core.kernels import reference

zo = torch.ops.zo_core
FUNCTIONS = {
    "update_": [ops._check_pass, ops._run, ops._update_, ops._fake_update_, reference.run_pass, native.run_pass, native._run],
    "perturb": [ops._check_pass, ops._run, ops._perturb, ops._fake_perturb, native.prepare],
    "perturb_rows": [ops._check_rows, ops._perturb_rows, ops._fake_perturb_rows, reference.run_rows, native.run_rows],
    "replay_": [ops._check_replay, ops._replay_, ops._fake_replay_, native.run_steps],
    "signs_": [ops._check_signs, ops._signs_, ops._fake_signs_, reference.signs_, native.signs_],
    "philox_": [ops._check_philox, ops._philox_, ops._fake_philox_, reference.philox_, reference.philox, native.philox_],
}  # fmt: skip
if find_spec("triton"):
    from zo_core.kernels import triton

    FUNCTIONS["update_"] += [triton.run_pass]
    FUNCTIONS["perturb_rows"] += [triton.run_rows]
    FUNCTIONS["philox_"] += [triton.philox_]


def schema_defaults(name: str) -> dict[str, object]:
    schema = getattr(zo, name).default._schema
    return {a.name: a.default_value for a in schema.arguments if a.has_default_value()}


def test_every_op_is_looked_at():
    assert set(FUNCTIONS) == {schema.partition("(")[0] for schema in ops._SCHEMAS}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_kernels_have_the_defaults_of_the_schema(name):
    expected = schema_defaults(name)
    for function in FUNCTIONS[name]:
        for parameter in inspect.signature(function).parameters.values():
            if parameter.default is not parameter.empty and parameter.name in expected:
                default = (
                    None if parameter.default == () else parameter.default
                )  # no list and an empty one are the same
                where = f"{function.__module__}.{function.__qualname__}: {parameter.name}"
                assert default == expected[parameter.name], where


def test_a_hessian_stays_in_its_range_whether_the_limits_are_given_or_not(backend, monkeypatch):
    monkeypatch.setattr(ops, "backend_for", lambda device: backend)
    low, high = reference.HESSIAN_RANGE
    for given in ({}, {"hessian_min": low, "hessian_max": high}):
        for start, smoothing, curvature, expected in ((1e8, 0.0, 1e3, high), (1e-8, 1.0, 0.0, low)):
            weights, hessian, one = torch.ones(300), torch.full((300,), start), torch.ones(1, 1)
            zo.update_(
                [weights], [hessian], [0], [], torch.tensor([1]), 0 * one, seed=1, distribution="rademacher",
                counters=torch.zeros(2, dtype=torch.int64), restore=0 * one, curvature=curvature * one,
                smoothing=torch.full((1,), smoothing), **given,
            )  # fmt: skip
            assert hessian.eq(torch.tensor(expected)).all() and weights.eq(1).all()


def test_the_c_library_refuses_a_range_that_was_left_at_zero():
    if not native.available():
        pytest.skip(f"the native library is {native.why_missing}")
    weights, hessian, one = torch.ones(3), torch.ones(3), torch.ones(1, 1)
    table = native._table([weights], [weights], [hessian], [0], [], [])
    scalars = {
        "restore": one,
        "curvature": one,
        "smoothing": torch.ones(1),
        "counters": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(RuntimeError, match="refused its arguments"):
        native._run(
            table.buffer_info()[0],
            1,
            torch.tensor([1]),
            one,
            1,
            "gaussian",
            hessian_min=0.0,
            hessian_max=0.0,
            **scalars,
        )
