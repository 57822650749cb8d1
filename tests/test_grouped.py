"""The grouped engine: its losses are those of the shadow engine, and what it cannot serve it leaves to that one."""

import copy
import os
import re
import signal
import warnings

import pytest
import ranks
import torch
from models import ARCHITECTURES, IDS, MORE, make
from peft import LoraConfig, get_peft_model
from shadows import bits, optimizer, unchanged
from torch import nn
from toys import X, Y, loss_of, same

import zo_core
from zo_core.distributed import Parallel
from zo_core.engines import folds, grouped
from zo_core.engines.grouped import GroupedEngine
from zo_core.integrations.config import FinetuneConfig

SERVED = [name for name in (*ARCHITECTURES, *MORE) if name not in ("mamba", "recurrent")]
NOISE = pytest.mark.parametrize(
    "noise", [("gaussian", 1), ("rademacher", 1), ("factored", 1), ("factored", 3)], ids=str
)


def points(*cs):
    """Theta, and points at these distances along as many probes, the last of them twice."""
    probes = [torch.tensor([3 + k]) for k in range(len(cs))]
    return [(0.0, None), *zip(cs, probes, strict=True), (-cs[-1], probes[-1])]


def losses(opt, loss, where, leave_out=()):
    with torch.no_grad():
        return opt._prepare().evaluate_all(loss, where, leave_out)


def both(model, loss, where, leave_out=(), **options):
    """Losses of the grouped engine, which must have served them itself, and of the shadow engine."""
    opts = [optimizer(model, engine, **options) for engine in ("grouped", "shadow")]
    found = [losses(opt, loss, where, leave_out) for opt in opts]
    assert opts[0]._engine.fallback is None
    return found


def network(seed=0):
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 17), nn.Tanh(), nn.LayerNorm(17), nn.Linear(17, 1))


# ---- the same losses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("distribution", ["gaussian", "factored"])
def test_losses_are_those_of_the_shadow_engine(name, distribution):
    model, loss = make(name)
    before = bits(model)
    found, expected = both(model, loss, points(1e-2, 2e-2), distribution=distribution)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5) and len(set(found.tolist())) == 4
    assert unchanged(model, before)


@NOISE
def test_losses_of_adapters_over_a_frozen_model(noise):
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "embed_tokens"], init_lora_weights=False)
        model = get_peft_model(make("llama")[0], config).eval()
    loss = lambda: model(input_ids=IDS, labels=IDS).loss  # noqa: E731
    found, expected = both(model, loss, points(0.1, 0.2), distribution=noise[0], rank=noise[1])
    assert torch.allclose(found, expected, rtol=0, atol=1e-5) and len(set(found.tolist())) == 4


@NOISE
def test_tensors_that_are_left_out_have_no_noise(noise):
    model, loss = make("nested")
    kept = [i for i, (name, _) in enumerate(model.named_parameters()) if name.startswith(("embed", "twice"))]
    found, expected = both(model, loss, points(1e-2, 2e-2), kept, distribution=noise[0], rank=noise[1])
    whole = losses(optimizer(model, "grouped", distribution=noise[0], rank=noise[1]), loss, points(1e-2, 2e-2))
    assert torch.allclose(found, expected, rtol=0, atol=1e-5) and not torch.allclose(found[1:], whole[1:], atol=1e-4)


@pytest.mark.parametrize("distribution", ["gaussian", "factored"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "bert"])
def test_dropout_is_the_same_at_all_points_and_that_of_the_shadow_engine(name, distribution):
    model, loss = make(name)
    with torch.no_grad():
        without = loss()
    model.train()
    found = []
    for engine in ("grouped", "shadow"):
        opt = optimizer(model, engine, lr=0.0, distribution=distribution, probes=2)
        with torch.random.fork_rng():
            torch.random.default_generator.manual_seed(4)
            found.append(opt.step(loss))
        assert getattr(opt._engine, "alone", None) is None
    assert torch.allclose(*found, rtol=0, atol=1e-5) and not torch.allclose(found[0], without, atol=1e-3)


@pytest.mark.parametrize("distribution", ["gaussian", "factored"])
def test_under_autocast_products_are_made_in_its_dtype(distribution):
    model, loss = make("llama")

    def cast():
        with torch.autocast("cpu", torch.bfloat16):
            return loss()

    found, expected = both(model, cast, points(1e-2, 2e-2), distribution=distribution)
    assert torch.allclose(found, expected, rtol=1e-2) and not torch.equal(
        found, losses(optimizer(model, "grouped", distribution=distribution), loss, points(1e-2, 2e-2))
    )


@NOISE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_losses_of_16_bit_weights_with_residuals(noise, dtype):
    model, loss = make("llama", dtype)
    opts = [optimizer(model, e, residual=8, distribution=noise[0], rank=noise[1]) for e in ("grouped", "shadow")]
    for opt in opts:
        for r in opt._prepare().space.residuals:
            r.fill_(100)
    found, expected = (losses(opt, loss, points(2e-2, 4e-2)) for opt in opts)
    assert opts[0]._engine.fallback is None and torch.allclose(found, expected, rtol=1e-2)


METHODS = {
    "mezo": (zo_core.MeZO, {"probes": 2}), "lezo": (zo_core.LeZO, {"rho": 0.5, "blocks": "2"}), "hizoo": (zo_core.HiZOO, {"smoothing": 1e-2}),
    "fzoo": (zo_core.FZOO, {"probes": 3}), "spsa": (zo_core.SPSA, {"probes": 2}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "distribution"),
    [(m, d) for m in METHODS for d in ("gaussian", "factored") if (m, d) != ("hizoo", "factored")],
)
def test_steps_of_all_methods_are_those_of_the_shadow_engine(name, distribution):
    method, options = METHODS[name]
    models, seen = [blocks(), blocks()], []
    for model, engine in zip(models, ("grouped", "shadow"), strict=True):
        opt = method(model, lr=1e-3, eps=1e-2, seed=5, engine=engine, distribution=distribution, **options)
        seen.append(torch.stack([opt.step(loss_of(model)) for _ in range(3)]))
        assert getattr(opt._engine, "alone", None) is None
    assert torch.allclose(*seen, atol=1e-5)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert torch.allclose(p, q, atol=1e-4)


def blocks():
    first, *rest = network()
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(1)
        inner = nn.ModuleList([nn.Linear(17, 17) for _ in range(4)])
    return nn.Sequential(first, rest[0], nn.Sequential(*inner), *rest[1:])


@pytest.mark.parametrize("distribution", ["gaussian", "factored"])
def test_chunks_have_the_losses_of_the_whole(distribution):
    model, loss = make("gpt2")
    where = points(1e-2, 2e-2, 3e-2)
    found = [
        losses(optimizer(model, "grouped", distribution=distribution, points_at_once=n), loss, where)
        for n in (None, 1, 2, 3)
    ]
    assert all(torch.allclose(f, found[0], rtol=0, atol=1e-5) for f in found)


def test_a_matrix_with_factored_noise_is_not_copied():
    model, loss = make("llama")
    opt = optimizer(model, "grouped", distribution="factored")
    losses(opt, loss, points(1e-2, 2e-2))
    opt._engine._scratch.peak = 0
    for _ in range(2):
        losses(opt, loss, points(1e-2, 2e-2))
    vectors = sum(p.nbytes + 64 for p in model.parameters() if p.dim() < 2)
    assert opt.memory()["scratch"] <= 2 * 4 * vectors < sum(p.nbytes for p in model.parameters())


def test_signs_are_made_in_one_call_and_vectors_in_one_pass_for_each_number_of_points(monkeypatch):
    """Whatever the number of matrices is; and a matrix that is read as a whole is in a group of its size from then on."""
    model, loss = make("llama")
    monkeypatch.setattr(grouped, "GROUP", 5 * sum(p.nbytes for p in model.parameters() if p.dim() == 1))
    opt = optimizer(model, "grouped", distribution="factored", rank=2)
    engine, calls = opt._prepare(), []
    losses(opt, loss, points(1e-2, 2e-2))
    for owner, name in ((engine._factors, "_make"), (engine, "_perturb")):
        run = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, n=name, run=run, **k: (calls.append(n), run(*a, **k)))
    for where in (points(1e-2, 2e-2), points(1e-2), points(1e-2, 2e-2, 3e-2)):
        calls.clear()
        losses(opt, loss, where)
        assert calls == ["_make", "_perturb"]
    vectors = [i for i, p in enumerate(engine.space.tensors) if p.dim() == 1]
    assert engine._plan_of(4).known(0) == [(i, torch.float32) for i in vectors] and len(engine._plan_of(4).groups) == 1
    head = model.lm_head.weight
    more = lambda: loss() + head.square().mean()  # noqa: E731
    found = [losses(o, more, points(1e-2, 2e-2)) for o in (opt, opt, optimizer(model, distribution="factored", rank=2))]
    assert torch.allclose(found[0], found[2], atol=1e-5) and torch.allclose(found[1], found[2], atol=1e-5)
    plan, number = engine._plan_of(4), engine._numbers[id(head)]
    assert plan.group_of[number] != plan.group_of[vectors[0]]
    assert opt.memory()["signs"] == 4 * 5 * 2 * engine._factors._shape[1]


def test_a_frozen_matrix_is_multiplied_once_for_all_points_and_may_be_written():
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(6, 8), nn.Embedding(50, 8)), torch.linspace(-1, 1, 120).view(4, 5, 6)
    head = model[1].weight.requires_grad_(False)

    def loss():
        with torch.no_grad():
            head[0] = 1.0
        last = model[0](x)[:, -1:, :]  # not contiguous: torch would batch the product, with a copy of the matrix each
        return nn.functional.linear(last, head).logsumexp(-1).mean() + model[1](torch.tensor([3])).mean()

    opt = optimizer(model, "grouped")
    expected = losses(optimizer(model), loss, points(1e-2, 2e-2))
    losses(opt, loss, points(1e-2))
    with torch.profiler.profile(record_shapes=True) as profile:
        found = losses(opt, loss, points(1e-2, 2e-2))
    assert opt._engine.fallback is None and torch.allclose(found, expected, rtol=0, atol=1e-5)
    shapes = [e.input_shapes for e in profile.events() if e.name in ("aten::bmm", "aten::baddbmm")]
    assert shapes and not any(50 in shape for call in shapes for shape in call)
    assert type(head) is nn.Parameter and torch.equal(head[0], torch.ones(8))


def test_the_number_of_points_at_once_falls_with_rows_and_copies(monkeypatch):
    engine = optimizer(make("llama")[0], "grouped")._prepare()
    engine.rows = 512
    assert engine._at_once() == 2
    engine.rows = 16
    assert engine._at_once() == 64
    engine._copied = {0: torch.float32}
    monkeypatch.setattr(grouped, "GROUP", engine.space.tensors[0].nbytes * 3)
    assert engine._at_once() == 3


@pytest.mark.parametrize(
    ("dtype", "frozen", "options", "singly"),
    [
        (torch.bfloat16, False, {}, True),
        (torch.bfloat16, False, {"engine": "grouped"}, False),
        (torch.bfloat16, False, {"points_at_once": 9}, False),
        (torch.bfloat16, True, {}, False),
        (torch.float32, False, {}, False),
    ],
    ids=str,
)
def test_long_batches_of_bfloat16_weights_are_evaluated_singly_unless_grouping_is_asked_for(
    monkeypatch, dtype, frozen, options, singly
):
    """All of a step alike: the engine is chosen anew before the next one."""
    monkeypatch.setattr(grouped, "_SINGLY", {"cpu": len(X)})
    model, calls = network().to(dtype), []
    model[0].requires_grad_(not frozen)
    opt = zo_core.FZOO(model, lr=1e-3, probes=4, **options)

    def step(n):
        calls.clear()
        opt.step(lambda: (calls.append(0), (model(X[:n].to(dtype)) - Y[:n]).square().mean())[1])
        return len(calls)

    whole, short = len(X), len(X) - 1
    assert step(whole) == 4 + (
        5 if singly else 1
    )  # with the comparison of two points, and the search for reads elsewhere
    assert [step(whole), step(short)] == ([5, 5] if singly else [1, 1])
    opt = zo_core.FZOO(model, lr=1e-3, probes=4, **options)
    assert [step(short), step(whole), step(whole)] == ([5, 1, 5] if singly else [5, 1, 1])
    assert opt.engine == "grouped" and opt.fallback is None


# ---- failures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", ["gaussian", "factored"])
def test_an_exception_at_any_module_boundary_leaves_every_bit(distribution):
    model, loss = make("llama", torch.bfloat16)
    opt = optimizer(model, "grouped", weight_decay=0.5, distribution=distribution)
    losses(opt, loss, points(1e-2))  # the comparison of the first evaluation is behind us
    before, calls, stop = bits(model), [], [None]

    def hook(module, *_):
        calls.append(module)
        if len(calls) == stop[0]:
            raise {0: RuntimeError, 1: KeyboardInterrupt, 2: ValueError}[len(calls) % 3]

    for module in model.modules():
        module.register_forward_pre_hook(hook)
    losses(opt, loss, points(1e-2))
    for stop[0] in range(1, len(calls) + 1, 4):
        calls.clear()
        with pytest.raises((RuntimeError, KeyboardInterrupt, ValueError)):
            opt.step(loss)
        assert unchanged(model, before) and torch._C._functorch.maybe_current_level() is None
    stop[0] = None
    opt.step(loss)
    assert not unchanged(model, before) and opt.updates == 1 and opt._engine.fallback is None


def test_an_error_that_the_closure_raises_once_is_raised():
    """Also where the line does not begin with ``raise``: the closure is not called again, and no other engine takes over."""
    model, loss = make("llama")
    opt, calls = zo_core.FZOO(model, lr=1e-3, probes=2), []

    def troubled():
        calls.append(0)
        if len(calls) == 1: raise ValueError("mine")  # noqa: E701 # fmt: skip
        return loss()

    opt.step(loss)
    before = bits(model)
    with pytest.raises(ValueError, match="mine"):
        opt.step(troubled)
    assert unchanged(model, before) and len(calls) == 1 and opt.fallback is None


def test_a_tensor_that_the_closure_stored_is_an_error_that_says_so():
    model, loss = make("llama")
    opt, total, before = zo_core.FZOO(model, lr=1e-3, probes=2), [torch.zeros(())], bits(model)

    def adding():
        found = loss()
        total[0] = total[0] + found.detach()
        return found

    with pytest.raises(
        RuntimeError, match="engine='grouped': the closure uses a tensor that it stored in an earlier call"
    ):
        opt.step(adding)
    assert unchanged(model, before)
    total[0] = torch.zeros(())
    other = zo_core.FZOO(model, lr=1e-3, probes=2, engine="shadow")
    other.step(adding)
    assert other.updates == 1


def test_what_is_left_to_the_shadow_engine_is_told():
    model, loss = make("llama")
    opt = zo_core.FZOO(model, lr=1e-3, probes=3)
    opt.step(loss)
    assert opt.fallback is None and opt.evaluations == 4
    opt = zo_core.FZOO(model, lr=1e-3, probes=3)
    with pytest.warns(UserWarning, match="evaluated at several points at once"):
        opt.step(lambda: loss().item())
    assert "item" in opt.fallback and opt.engine == "grouped" and opt.evaluations == 4


@pytest.mark.parametrize("where", ["_perturb", "_begin_at", "_fill", "restore", "product"])
def test_a_signal_anywhere_in_a_step_is_all_or_nothing(monkeypatch, where):
    class Stop(BaseException):
        pass

    def stop(*_):
        raise Stop

    model, loss = make("llama")
    opt = optimizer(model, "grouped", distribution="factored")
    losses(opt, loss, points(1e-2))
    before, engine = bits(model), opt._prepare()
    original = getattr(engine, where)

    def interrupted(*args, **kwargs):
        result = original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGALRM)
        return result

    previous = signal.signal(signal.SIGALRM, stop)
    monkeypatch.setattr(engine, where, interrupted)
    try:
        with pytest.raises(Stop):
            opt.step(loss)
    finally:
        signal.signal(signal.SIGALRM, previous)
    monkeypatch.setattr(engine, where, original)
    engine.restore()
    assert unchanged(model, before) and torch._C._functorch.maybe_current_level() is None
    opt.step(loss)
    assert opt.updates == 1 and engine.fallback is None


def test_out_of_memory_halves_the_points_once_with_a_note():
    model = network()
    opt, largest = optimizer(model, "grouped", probes=4), [4]

    def loss():
        value = model(torch.ones(3, 6)).square().mean()
        if (
            torch._C._functorch.is_batchedtensor(value)
            and torch._C._functorch.get_unwrapped(value).numel() > largest[0]
        ):
            raise torch.OutOfMemoryError("no more")
        return value

    before = bits(model)
    with pytest.warns(UserWarning, match="out of memory with 8 points at once, from now on there are 4"):
        opt.step(loss)
    assert opt.updates == 1 and opt._engine._at_once() == 4
    largest[0], before = 3, bits(model)
    with pytest.raises(torch.OutOfMemoryError):
        opt.step(loss)
    assert unchanged(model, before)


def test_a_loss_that_is_not_finite_skips_the_step():
    model, x = network(), torch.ones(3, 6)
    opt, before = optimizer(model, "grouped", probes=2), bits(model)
    opt.step(lambda: model(x).sum())
    moved = bits(model)
    assert not unchanged(model, before)
    opt.step(lambda: (model(x).sum() - 1e9).sqrt())
    assert unchanged(model, moved) and opt.skipped == 1 and opt._engine.fallback is None


def test_writing_a_weight_in_the_closure_is_refused():
    model, x = network(), torch.ones(3, 6)
    before = bits(model)
    for write in (lambda: model[0].weight.zero_(), lambda: nn.init.ones_(model[0].weight)):
        with pytest.raises(RuntimeError, match=r"writes 0\.weight during an evaluation"):
            optimizer(model, "grouped").step(lambda write=write: (model(x).sum(), write())[0])
        assert unchanged(model, before)


# ---- what it leaves to the shadow engine -------------------------------------------------------------------------

TOTAL = torch.zeros(())


def kept(value):
    TOTAL.zero_().add_(value)
    return TOTAL.clone()


CLOSURES = {
    "item": lambda y: y.square().mean().item(),
    "float": lambda y: float(y.square().mean()),
    "numpy": lambda y: y.square().mean().detach().numpy(),
    "branch": lambda y: y.sum() if y.sum() > 0 else -y.sum(),
    "write": lambda y: kept(y.square().mean()),
    "shape": lambda y: y[y > y.mean()].sum(),
    "group": lambda y: y.sum() * (1 if torch._C._functorch.maybe_current_level() is None else 2),
}


@pytest.mark.parametrize("name", CLOSURES)
def test_a_closure_that_cannot_be_batched_is_evaluated_by_the_shadow_engine_with_one_warning(name):
    models, x = [network(), network()], torch.linspace(-1, 1, 18).view(3, 6)
    reason = "its losses are" if name == "group" else r"test_grouped\.py, line \d+, `"
    opts = [optimizer(m, e, residual=8) for m, e in zip(models, ("grouped", "shadow"), strict=True)]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            found = [o.step(lambda m=m: CLOSURES[name](m(x))) for o, m in zip(opts, models, strict=True)]
            assert torch.equal(*found) and same(*models)
    told = [str(w.message) for w in seen]
    assert len(told) == 1 and "engine='grouped'" in told[0]
    assert re.search(reason, told[0])


def test_a_closure_that_generates_is_evaluated_by_the_shadow_engine():
    model, _ = make("llama")
    before, opt = bits(model), optimizer(model, "grouped", lr=0.0)
    with pytest.warns(UserWarning, match="engine='grouped'"):
        opt.step(lambda: model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False).float().mean())
    assert unchanged(model, before)


MODULES = {
    "batch norm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)), "engine='grouped'"),
    "lstm": (lambda: nn.Sequential(nn.LSTM(6, 4), Taken()), "lstm"),
    "compiled": (lambda: compiled(network()), "compiled or scripted"),
    "scripted": (lambda: nn.Sequential(torch.jit.script(nn.Linear(6, 1))), "compiled or scripted"),
    "counter": (lambda: nn.Sequential(Counting(), network()), "write their buffers"),
}


class Taken(nn.Module):
    def forward(self, pair):
        return pair[0]


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x


def compiled(model):
    model[0].compile(backend="eager")
    return model


@pytest.mark.filterwarnings("ignore:.*(torch.jit|read elsewhere).*")
@pytest.mark.parametrize("name", MODULES)
def test_a_module_that_cannot_be_batched_is_evaluated_by_the_shadow_engine(name):
    make_module, reason = MODULES[name]
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        model = make_module()
    opts, x = [optimizer(model, e, lr=0.0) for e in ("grouped", "shadow")], torch.linspace(-1, 1, 18).view(3, 6)
    before = bits(model)
    with pytest.warns(UserWarning, match=reason):
        found = opts[0].step(lambda: model(x).square().mean())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*grouped.*")
        opts[0]._own["stream"].zero_()
        again = opts[0].step(lambda: model(x).square().mean())
    expected = opts[1].step(lambda: model(x).square().mean())
    assert unchanged(model, before) and torch.allclose(found, expected) and torch.allclose(again, expected)


# ---- around it ---------------------------------------------------------------------------------------------------


def test_a_run_is_made_again_from_its_journal(tmp_path):
    model = network()
    twin = copy.deepcopy(model)
    opt = zo_core.FZOO(model, lr=1e-3, engine="grouped", distribution="factored", rank=2, probes=4)
    opt.journal = zo_core.Journal.create(tmp_path / "run.zoj", opt)
    for _ in range(5):
        opt.step(loss_of(model))
    zo_core.replay(twin, tmp_path / "run.zoj")
    assert same(model, twin)


def test_a_run_goes_on_from_its_state_with_the_same_chunks_bit_for_bit(monkeypatch):
    monkeypatch.setattr(grouped, "_ROWS", {"cpu": 256})
    sizes, chunks, at = [20, 30, 8, 64, 5], [], GroupedEngine._at  # rows: the most so far decide
    monkeypatch.setattr(GroupedEngine, "_at", lambda self, c, p, out: (chunks.append(len(p)), at(self, c, p, out))[1])

    def run(model, first, last, state=None):
        opt = zo_core.FZOO(model, lr=1e-2, engine="grouped", distribution="factored", probes=40)
        if state:
            opt.load_state_dict(state)
        for n in sizes[first:last]:
            opt.step(lambda n=n: (model(X[:n]) - Y[:n]).square().mean())
        seen, chunks[:] = [n for n in chunks if n != 2], []  # without the comparison of the first two points
        return opt.state_dict(), seen

    one, two = network(), network()
    _, whole = run(one, 0, 5)
    state, first = run(two, 0, 2)
    _, second = run(two, 2, 5, state)
    assert same(one, two) and whole == first + second and len(set(whole)) > 2


def train(parallel):
    model = network()
    opt = zo_core.FZOO(model, lr=1e-2, engine="grouped", distribution="factored", probes=5, processes=parallel)
    found = [float(opt.step(loss_of(model))) for _ in range(4)]
    return found, bits(model), opt._engine.fallback


def test_processes_evaluate_their_shares_of_the_points():
    alone, both = train(None), ranks.run(train, 2, Parallel(data=1))
    for found, weights, left in both:
        assert left is None and found == both[0][0] and all(torch.equal(w, both[0][1][n]) for n, w in weights.items())
        torch.testing.assert_close(found, alone[0], atol=1e-5, rtol=0)


def test_factored_noise_is_grouped_unless_another_engine_is_named():
    model = network()
    factored = zo_core.MeZO(model, lr=1e-3, distribution="factored")
    assert factored.engine == "grouped" and isinstance(factored._prepare(), GroupedEngine)
    assert zo_core.MeZO(model, lr=1e-3, distribution="factored", engine="shadow").engine == "shadow"
    assert zo_core.MeZO(list(model.parameters()), lr=1e-3, distribution="factored").engine == "inplace"
    other = zo_core.MeZO(model, lr=1e-3)
    assert other.engine == "shadow"
    other.load_state_dict(factored.state_dict())  # whose noise is that of the run
    assert other.engine == "grouped" and isinstance(other._prepare(), GroupedEngine)
    assert copy.deepcopy(other).engine == "grouped"


def test_products_in_tf32_may_differ_as_those_in_float16(monkeypatch):
    engine = zo_core.MeZO(network(), lr=1e-3, engine="grouped")._prepare()
    plain = engine._rounding(torch.float32)
    monkeypatch.setattr(engine, "device", torch.device("cuda"))
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert engine._rounding(torch.float32) == engine._rounding(torch.float16) > plain
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert engine._rounding(torch.float32) == plain
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


class CudaAttention:
    """What CUDA's kernel of attention takes and returns, computed on the CPU; it refuses masks that the kernel refuses."""

    _schema = torch.ops.aten._scaled_dot_product_efficient_attention.default._schema

    def __call__(self, query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, scale=None):
        if attn_bias is not None:
            assert attn_bias.shape == (*query.shape[:3], key.shape[2]) and attn_bias.stride(-2) % 16 == 0
        out = nn.functional.scaled_dot_product_attention(query, key, value, attn_bias, scale=scale)
        return out, out.sum(-1), torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)


@pytest.mark.parametrize("examples", [1, 3])
@pytest.mark.parametrize("mask", ["none", "one for all", "of each example", "of each example, point and head"])
def test_a_cuda_kernel_of_attention_gets_points_and_examples_as_one_dimension(mask, examples):
    points, heads, n = 4, 2, 5
    query, key, value = torch.randn(3, points, examples, heads, n, 8)
    padded = torch.zeros(examples, 1, n, 16)[..., :n]  # as torch lays masks out for the kernel
    padded[:, :, :, 0] = -torch.arange(examples).view(-1, 1, 1) - 1.0
    masks = {
        "none": None, "one for all": padded[:1].expand(examples, heads, n, n), "of each example": padded.expand(-1, heads, -1, -1),
        "of each example, point and head": torch.randn(points, examples, heads, n, n),
    }  # fmt: skip
    given, each = masks[mask], mask.endswith("head")
    rule = folds.attention_of(CudaAttention())
    found = torch.vmap(lambda q, k, v, m: rule(q, k, v, m, False)[:2], in_dims=(0, 0, 0, 0 if each else None))(
        query, key, value, given
    )
    for i in range(points):
        one = given[i] if each else given
        expected = nn.functional.scaled_dot_product_attention(query[i], key[i], value[i], one)
        torch.testing.assert_close(found[0][i], expected)
        torch.testing.assert_close(found[1][i], expected.sum(-1))
    with pytest.raises(RuntimeError, match="dropout inside of this kernel"):
        torch.vmap(lambda q: rule(q, q, q, None, False, 0.5)[0])(query)


def test_options_are_checked():
    with pytest.raises(ValueError, match="points_at_once"):
        zo_core.MeZO(network(), lr=1e-3, engine="grouped", points_at_once=0)
    with pytest.raises(ValueError, match="module="):
        zo_core.MeZO(network().parameters(), lr=1e-3, engine="grouped")
    config = FinetuneConfig(engine="grouped", points_at_once=3)
    assert config.optimizer(network()).points_at_once == 3
