"""The check that a user's card gets, on the kernels as compiled, and with a fault in them for each of its answers."""

import os

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("kernels are interpreted in this process, and never compiled", allow_module_level=True)

from zo_core.bindings import cuda, ops
from zo_core.kernels import selfcheck
from zo_core.kernels import triton as backend
from zo_core.kernels.triton import cache, launch

import ptx
from ptx.mutants import Mutant, load

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def gpu():
    with ptx.emulated(int(os.environ.get("ZO_CORE_PTX", "80"))) as gpu:
        yield gpu


def test_the_kernels_as_compiled_give_the_known_answers():
    assert selfcheck.run(backend, CPU) == {}


# Each fault is in what the answer is about and, where its code serves others as well, only under the answer's own conditions.
MUTANTS = [
    Mutant("Philox words", "noise.py", "tl.store(at + 1, w1.to", "tl.store(at + 1, w2.to", None),
    Mutant("Rademacher signs", "streams.py", "tl.load(call.streams + k).to(tl.uint32), c,",
           "(tl.load(call.streams + k) & 0x7FFFFFFF).to(tl.uint32), c,", None),
    Mutant("Gaussian bounds", "streams.py", "noise = stream.c * z if", "noise = stream.c * z * 1.00001 if", None),
    Mutant("rounding to nearest", "rounding.py", "            return x.to(tl.bfloat16)",
           "            return ((b >> 16).to(tl.uint16)).to(tl.bfloat16, bitcast=True)", None),
    Mutant("stochastic rounding", "rounding.py", "b = (b + random) >> 16", "b = (b + (random ^ 0x8000)) >> 16", None),
    Mutant("residuals of 8 bits", "residuals.py", "dp2a.lo.s32.s32 $1, high, $6, b;", "dp2a.lo.s32.s32 $1, low, $6, b;", None),
    Mutant("residuals of 16 bits", "residuals.py", "add.u32 b, $3, 0x8000;", "mov.b32 b, $3;", None),
    Mutant("sum of 8 streams", "sums.py", "mask=k < n_streams, other=0.0) * inverse",
           "mask=(k < n_streams) & ((k != 7) | (n_streams > 8)), other=0.0) * inverse", None),
    Mutant("sum of 40 streams", "sums.py", "for step in range(1, made.n_steps):", "for step in range(1, made.n_steps - 1):", None),
    Mutant("gathered rows", "rows.py", "at = offset.to(tl.int64) + source * width", "at = offset.to(tl.int64) + j * width", None),
    Mutant("Hessian", "passes.py", "h * (work.remain + squares)", "h * (1.0 + squares)", None),
    Mutant("second moment", "passes.py", "inverse(root(squares) + FLOOR)", "inverse(squares + FLOOR)", None),
    Mutant("scales in two factors", "places.py", "return factor * load_columns(", "return load_columns(", None),
    Mutant("factored noise", "factored.py", "word ^= 0xFFFFFFFF", "word ^= 0", None),
    Mutant("slice", "noise.py", "high = (first >> 32).to(tl.uint32) | above",
           "high = ((first >> 32).to(tl.uint32) & 0) | above", None),
    Mutant("unaligned view", "table.py", "at[0] % 16 == at[1] % 16 ==", "at[0] % 4 == at[1] % 4 ==", None),
    Mutant("coefficient that is not finite", "gate.py", "if all_finite == 0:", "if all_finite == 2:", None),
]  # fmt: skip


def test_every_answer_has_a_mutant():
    assert [m.name for m in MUTANTS] == list(selfcheck.ANSWERS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_fault_in_the_kernels_turns_its_answer_red(mutant, tmp_path, monkeypatch):
    """And leaves the signs right, the answer that compiles least; test_selfcheck.py has all others for each fault."""
    answers = {name: selfcheck.ANSWERS[name] for name in {mutant.name, "Rademacher signs"}}
    if os.environ.get("ZO_CORE_PTX_ALL"):
        answers = selfcheck.ANSWERS
    monkeypatch.setattr(selfcheck, "ANSWERS", answers)
    assert list(selfcheck.run(load(mutant, tmp_path), CPU)) == [mutant.name]


# ---- compiled forms -------------------------------------------------------------------------------------------------


def forms_of(run) -> dict[str, int]:
    """Compiled forms of each kernel that this takes, from none."""
    for kernel in cache.KERNELS.values():
        kernel.function.device_caches.clear()
    launch._compiled.clear()
    run()
    return {name: n for name, n in cache.used().items() if n}


def call(n: int, k: int = 1, *, seed: int = 1, stream: int = 0, skewed: int = 0, c: float = 0.5, at: int = 0) -> None:
    """A pass over a tensor and over gathered rows, words, and all that it may depend on, by Triton's own launches.

    Forms that were launched before are called past Triton (launch.py), which is right as long as no value makes another form.
    """
    launch._compiled.clear()
    weights = torch.zeros(n + skewed)[skewed:]
    numbers = torch.arange(stream, stream + k + at)[at:]  # as an optimizer's probes, which are slices of one tensor
    coeffs = torch.full((k, 1), c)
    key = {"seed": seed, "distribution": "rademacher"}
    backend.run_pass(
        [weights], [weights], [], [n], [n], numbers, coeffs, counters=torch.zeros(2 + at).long()[at:], **key
    )
    rows = torch.zeros(3, max(n, 1))
    chosen, dst = torch.zeros(n % 5, dtype=torch.int64), torch.zeros(n % 5, max(n, 1))
    backend.run_rows(rows, chosen, dst, n, n, numbers, coeffs, counters=torch.zeros(2).long(), **key)
    backend.philox_(
        torch.zeros(n, 4, dtype=torch.int32), domain=n % 3, tensor_id=n, stream=stream & 0xFFFFFFFF, block=n, seed=seed
    )


def test_no_value_compiles_anew():
    call(33)
    forms = cache.used()
    for n in (1, 2, 16, 17, 48, 64, 1024, 1030):
        call(n)
    for seed in (0, 1, 16, 17, 2**31, 2**32, 2**63, 2**64 - 1):
        call(19, seed=seed)
    for stream in (1, 16, 2**31, 2**32, 2**62):
        call(19, stream=stream)
    for c in (0.0, 1.0, 16.0, -1e30, float("nan"), float("inf")):
        call(19, c=c)
    for skewed in (1, 2, 3):
        call(19, skewed=skewed)
    for at in (1, 2):
        call(19, at=at)
    assert cache.used() == forms
    for k in (5, 6, 16, 17, 40):
        call(19, k)
        forms = forms if k > 5 else cache.used()
    assert cache.used() == forms, "numbers of streams from 5 on are one form"


def test_no_rank_nor_number_of_columns_compiles_anew():
    def factored(k: int, rank: int, columns: int) -> None:
        launch._compiled.clear()
        weights, coeffs = torch.zeros(24), torch.ones(k, 1)
        backend.run_pass(
            [weights], [weights], [], [3], [5], torch.arange(k), coeffs, seed=1, distribution="factored", rank=rank,
            columns=[columns], counters=torch.zeros(2).long(),
        )  # fmt: skip

    factored(1, 1, 8)
    factored(2, 1, 8)
    forms = cache.used()
    for k, rank, columns in ((1, 1, 1), (1, 1, 16), (1, 1, 1 << 40), (0, 1, 3), (1, 2, 24), (16, 1, 48), (3, 7, 2)):
        factored(k, rank, columns)
    assert cache.used() == forms


def steps(method, **options) -> None:
    """Three steps of a model in bfloat16 with an embedding, matrices and vectors."""
    import zo_core

    g = torch.Generator().manual_seed(1)
    model = torch.nn.Sequential(
        torch.nn.Embedding(50, 32), torch.nn.Linear(32, 17), torch.nn.Tanh(), torch.nn.Linear(17, 4)
    ).bfloat16()
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g) * 0.3)
    ids, labels = torch.randint(0, 50, (6,), generator=g), torch.randint(0, 4, (6,), generator=g)
    optimizer = getattr(zo_core, method)(model, lr=1e-3, eps=1e-2, **options)
    for _ in range(3):
        optimizer.step(lambda: torch.nn.functional.cross_entropy(model(ids).float(), labels))


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("MeZO", {}, {"gate_kernel": 1, "pass_kernel": 2, "rows_kernel": 1}),
        (
            "MeZO",
            {"distribution": "factored"},
            {"gate_kernel": 1, "pass_kernel": 4, "rows_kernel": 1, "signs_kernel": 1},
        ),
        (
            "FZOO",
            {"distribution": "rademacher"},
            {"gate_kernel": 1, "pass_kernel": 2, "rows_kernel": 1, "digits_kernel": 1},
        ),
        (
            "FZOO",  # whose engine is then the grouped one, with signs of several streams at once
            {},
            {"gate_kernel": 1, "pass_kernel": 4, "rows_kernel": 1, "digits_kernel": 1, "signs_kernel": 2},
        ),
        ("HiZOO", {}, {"gate_kernel": 1, "pass_kernel": 2, "rows_kernel": 1}),
    ],
)
def test_a_run_compiles_few_forms(monkeypatch, method, options, expected):
    """One that perturbs, one that updates, one for gathered rows, one that looks at scalars. Factored: matrices and vectors apart."""
    monkeypatch.setattr(ops, "backend_for", lambda device: backend)
    monkeypatch.setattr(cuda, "_chosen", {})
    assert forms_of(lambda: steps(method, **options)) == expected
