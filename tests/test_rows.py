"""``perturb_rows`` on the CPU backends: the rows of the perturbed matrix, through the op, with its checks and fake."""

import pytest
import torch
from zo_core.bindings import ops


def arguments(rows: list[int]) -> tuple[tuple, dict]:
    src, names = torch.linspace(-1, 1, 9 * 37).view(9, 37), torch.tensor(rows, dtype=torch.int64)
    args = (
        src,
        names,
        torch.full((len(rows), 37), torch.nan),
        4,
        1000,
        torch.tensor([3, 8]),
        torch.tensor([[0.1], [0.2]]),
    )
    return args, {"seed": 5, "distribution": "gaussian", "counters": torch.zeros(2, dtype=torch.int64)}


@pytest.mark.parametrize("noise", [{}, {"distribution": "factored", "rank": 3}], ids=str)
def test_rows_are_those_of_the_perturbed_matrix(backend, monkeypatch, noise):
    monkeypatch.setattr(ops, "backend_for", lambda device: backend)
    args, options = arguments([8, 0, 8, 3])
    options |= noise
    src, names, dst, tensor_id, offset, streams, coeffs = args
    whole = torch.empty_like(src)
    torch.ops.zo_core.perturb([src], [whole], [], [tensor_id], [offset], streams, coeffs, **options)
    torch.ops.zo_core.perturb_rows(*args, **options)
    assert torch.equal(dst, whole[names])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16], ids=str)
def test_rows_with_residuals_are_those_of_the_perturbed_matrix(backend, monkeypatch, dtype):
    monkeypatch.setattr(ops, "backend_for", lambda device: backend)
    (src, names, dst, *rest), options = arguments([8, 0, 8, 3])
    src, residual = src.bfloat16(), torch.randint(-128, 128, src.shape, dtype=dtype)
    whole = torch.empty(src.shape)
    tensor_id, offset, streams, coeffs = rest
    torch.ops.zo_core.perturb(
        [src], [whole], [], [tensor_id], [offset], streams, coeffs, **options, residuals=[residual]
    )
    torch.ops.zo_core.perturb_rows(src, names, dst, *rest, **options, residual=residual)
    assert torch.equal(dst, whole[names]) and not torch.equal(dst.bfloat16(), dst)
    none = torch.empty(0, dtype=dtype)
    torch.ops.zo_core.perturb_rows(src, names, dst, *rest, **options, residual=none)
    torch.ops.zo_core.perturb([src], [whole], [], [tensor_id], [offset], streams, coeffs, **options)
    assert torch.equal(dst, whole[names])


@pytest.mark.parametrize("columns", [0, 1, 37, 100])
def test_rows_with_scales_are_those_of_the_perturbed_matrix(backend, monkeypatch, columns):
    monkeypatch.setattr(ops, "backend_for", lambda device: backend)
    (src, names, dst, *rest), options = arguments([8, 0, 8, 3])
    tensor_id, offset, streams, coeffs = rest
    whole = torch.empty_like(src)
    row, column = torch.rand(-(-(1000 + src.numel()) // (columns or 1))) + 0.5, torch.rand(columns) + 0.5
    torch.ops.zo_core.perturb(
        [src], [whole], [], [tensor_id], [offset], streams, coeffs, **options, row_scales=[row], column_scales=[column]
    )
    torch.ops.zo_core.perturb_rows(src, names, dst, *rest, **options, row_scale=row, column_scale=column)
    assert torch.equal(dst, whole[names])


def test_rows_with_a_hessian_are_those_of_the_perturbed_matrix(backend, monkeypatch):
    monkeypatch.setattr(ops, "backend_for", lambda device: backend)
    (src, names, dst, *rest), options = arguments([8, 0, 8, 3])
    tensor_id, offset, streams, coeffs = rest
    whole, hessian = torch.empty_like(src), torch.rand(src.shape) + 0.5
    torch.ops.zo_core.perturb([src], [whole], [hessian], [tensor_id], [offset], streams, coeffs, **options)
    torch.ops.zo_core.perturb_rows(src, names, dst, *rest, **options, hessian=hessian)
    assert torch.equal(dst, whole[names])


def test_saturated_elements_of_all_rows_are_counted(backend, monkeypatch):
    monkeypatch.setattr(ops, "backend_for", lambda device: backend)
    args, options = arguments([5, 5, 2])
    src = torch.full_like(args[0], torch.finfo(torch.float32).max)
    torch.ops.zo_core.perturb_rows(src, *args[1:-1], torch.full((2, 1), 1e38), **options)
    beyond = (args[2] == src[0, 0]).sum()
    assert 0 < beyond < 111 and options["counters"].tolist() == [0, int(beyond)]


def test_no_rows_and_a_coefficient_that_is_not_finite(backend, monkeypatch):
    monkeypatch.setattr(ops, "backend_for", lambda device: backend)
    args, options = arguments([])
    torch.ops.zo_core.perturb_rows(*args, **options)
    args, options = arguments([1, 2])
    args[-1][0] = float("inf")
    torch.ops.zo_core.perturb_rows(*args, **options)
    assert args[2].isnan().all() and options["counters"].tolist() == [1, 0]


def test_schema_and_fake():
    args, options = arguments([1, 2])
    torch.library.opcheck(torch.ops.zo_core.perturb_rows.default, args, options)
    residual = torch.ones(args[0].shape, dtype=torch.int8)
    args = (args[0].half(), *args[1:])
    torch.library.opcheck(torch.ops.zo_core.perturb_rows.default, args, options | {"residual": residual})
    torch.library.opcheck(torch.ops.zo_core.perturb_rows.default, args, options | {"hessian": torch.ones(9, 37)})
    factors = {"row_scale": torch.ones(37), "column_scale": torch.ones(37)}
    torch.library.opcheck(torch.ops.zo_core.perturb_rows.default, args, options | factors)


def test_messages_name_the_argument():
    args, options = arguments([1, 2])
    with pytest.raises(ValueError, match="src, rows, dst"):
        torch.ops.zo_core.perturb_rows(args[0], args[1], args[2][:1], *args[3:], **options)
    with pytest.raises(TypeError, match=r"residuals\[0\].*float32"):
        torch.ops.zo_core.perturb_rows(*args, **options, residual=torch.ones(args[0].shape, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"hessians\[0\].*\(9, 37\).*\(8, 37\)"):
        torch.ops.zo_core.perturb_rows(*args, **options, hessian=torch.ones(8, 37))
    shared = torch.ones(9, 37)
    for scales in (
        {"hessian": shared},
        {"row_scale": shared, "column_scale": torch.ones(37)},
        {"row_scale": torch.ones(37), "column_scale": shared},
    ):
        with pytest.raises(ValueError, match="(hessian|row_scale|column_scale) overlap"):
            torch.ops.zo_core.perturb_rows(*args[:2], shared[:2], *args[3:], **options, **scales)
    with pytest.raises(
        ValueError, match=r"row_scales\[0\].*expected 37 numbers.*1333.*got 36"
    ):  # 1000 + 9 * 37 elements
        torch.ops.zo_core.perturb_rows(*args, **options, row_scale=torch.ones(36), column_scale=torch.ones(37))
    with pytest.raises(TypeError, match="rows"):
        torch.ops.zo_core.perturb_rows(args[0], args[1].int(), *args[2:], **options)
