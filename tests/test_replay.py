"""The op that replays many steps: the same bits and counts as a pass a step, on every CPU backend."""

import copy

import pytest
import torch
from cases import BF16, F16, F32, SEED, Case, make
from zo_core.bindings import ops

zo = torch.ops.zo_core
STEPS = 7
SIZES = {"sizes": (2100, 129, 0, 40, 5000), "offsets": (2**34 + 1003, 1, 127, 64, 2047)}
CASES = [
    Case(d, t, k=k, decay=k > 1, stochastic=s, residual=r, skewed=k, **SIZES)
    for d in ("gaussian", "rademacher")
    for t, r, s in ((F32, 0, False), (BF16, 0, True), (BF16, 8, True), (BF16, 16, False), (F16, 8, False), (F16, 16, True))
    for k in (1, 3)
] + [Case("rademacher", F16, bad="range", k=2, **SIZES), Case("gaussian", mixed=True, k=0, decay=True, **SIZES),
     Case("factored", BF16, k=2, rank=2, widths=(300, 0, 1, 8, 700), residual=8, stochastic=True, **SIZES)]  # fmt: skip


def steps_of(case: Case) -> tuple[dict, dict]:
    """Arguments of update_, all but its first from case, and of replay_ for STEPS steps, the third of which is NaN."""
    job = make(case)
    weights, _, _, ids, offsets, streams, coeffs = job["args"]
    decay = job["options"].get("decay")
    scale = torch.linspace(-1, 2, STEPS).view(-1, 1, 1)
    every = {
        "weights": weights, "tensor_ids": ids, "offsets": offsets, "streams": streams + 5 * torch.arange(STEPS)[:, None],
        "coeffs": coeffs * scale, "decay": None if decay is None else decay * scale[:, 0].abs(),
        "updates": torch.arange(STEPS) + 2**32 if case.stochastic else None,
        "residuals": job["options"].get("residuals"), "counters": job["options"]["counters"],
        "seed": ops.signed64(SEED), "distribution": case.distribution, "rank": case.rank,
        "columns": job["options"].get("columns"),
    }  # fmt: skip
    if case.k:
        every["coeffs"][2, 0, 1] = torch.nan
    elif decay is not None:
        every["decay"][2, 1] = torch.inf
    return job, every


@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_in_one_call_are_the_steps_one_by_one(backend, monkeypatch, case):
    monkeypatch.setattr(ops, "backend_for", lambda device: backend)
    (job, got), (one_by_one, expected) = steps_of(case), steps_of(case)
    zo.replay_(**got)
    steps = {name: expected.pop(name) for name in ("streams", "coeffs", "decay", "updates")}
    for s in range(STEPS):
        step = {name: None if x is None else x[s] for name, x in steps.items()}
        zo.update_(hessians=[], update=step.pop("updates"), **step, **expected)
    assert got["counters"].tolist() == expected["counters"].tolist()
    assert got["counters"][0] == 1
    for x, y in zip(job["buffers"], one_by_one["buffers"], strict=True):
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))
    moved = [not torch.equal(x, y) for x, y in zip(job["args"][0], job["inputs"], strict=False) if x.numel()]
    assert any(moved)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_share_many_steps_of_few_tiles(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        w = torch.zeros(3000)
        options = {"seed": 1, "distribution": "gaussian", "counters": torch.zeros(2, dtype=torch.int64)}
        zo.replay_([w], [0], [], torch.arange(200).view(-1, 1), torch.full((200, 1, 1), 0.1), **options)
    finally:
        torch.set_num_threads(before)
    expected = torch.zeros(3000)
    for s in range(200):
        zo.update_([expected], [], [0], [], torch.tensor([s]), torch.full((1, 1), 0.1), **options)
    assert torch.equal(w, expected)


def good() -> dict:
    return {
        "weights": [torch.zeros(5), torch.zeros(3)], "tensor_ids": [0, 1], "offsets": [],
        "streams": torch.zeros(4, 2, dtype=torch.int64), "coeffs": torch.ones(4, 2, 2), "seed": 1,
        "distribution": "gaussian", "counters": torch.zeros(3, dtype=torch.int64),
    }  # fmt: skip


def test_opcheck_and_versions():
    call = good() | {"decay": torch.zeros(4, 2), "updates": torch.zeros(4, dtype=torch.int64)}
    torch.library.opcheck(zo.replay_.default, (), call)
    versions = [w._version for w in call["weights"]]
    zo.replay_(**call)
    assert all(w._version > v for w, v in zip(call["weights"], versions, strict=True))
    none = good() | {"streams": torch.zeros(0, 2, dtype=torch.int64), "coeffs": torch.ones(0, 2, 2)}
    zo.replay_(**none)
    assert not none["weights"][0].any()


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"streams": torch.zeros(4, dtype=torch.int64)}, ValueError, r"streams: expected shape \(S, K\)"),
        ({"streams": torch.zeros(4, 2)}, TypeError, "streams: expected torch.int64"),
        ({"coeffs": torch.ones(4, 2)}, ValueError, r"coeffs: expected shape \(4, 2, 2\), got \(4, 2\)"),
        ({"decay": torch.ones(2)}, ValueError, r"decay: expected shape \(4, 2\)"),
        ({"updates": torch.ones(4)}, TypeError, "updates: expected torch.int64"),
        ({"updates": torch.ones(3, dtype=torch.int64)}, ValueError, r"updates: expected shape \(4,\)"),
        ({"weights": [torch.zeros(5).double(), torch.zeros(3)]}, TypeError, r"weights\[0\]"),
        ({"counters": torch.zeros(2, dtype=torch.int64)}, ValueError, "counters"),
        ({"distribution": "uniform"}, ValueError, "distribution"),
    ],
)
def test_wrong_arguments_are_refused_before_a_weight_moves(wrong, error, says):
    call = good() | wrong
    before = copy.deepcopy(call["weights"])
    with pytest.raises(error, match=says):
        zo.replay_(**call)
    assert all(torch.equal(a, b) for a, b in zip(call["weights"], before, strict=True))
