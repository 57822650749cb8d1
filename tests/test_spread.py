"""A closure for each probe: what is called when, what failures leave behind, and how processes share them.

That the steps are right is held in test_twins.py.
"""

import pytest
import ranks
import torch
from torch import distributed as dist
from torch import nn
from toys import X, Y, loss_of

import zo_core
from zo_core.distributed import Parallel, RankError


def network(dropout=0.0, norm=False):
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        layers = [nn.Linear(6, 17), nn.Tanh(), nn.Dropout(dropout), nn.Linear(17, 1)]
        return nn.Sequential(*layers[:2], *([nn.BatchNorm1d(17)] if norm else []), *layers[2:])


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def batches(model, n):
    return [loss_of(model, k, n) for k in range(n)]


def logged(closures, calls):
    """The closures; which of them is called goes to a list."""

    def log(k, closure):
        def call():
            calls.append(k)
            return closure()

        return call

    return [log(k, closure) for k, closure in enumerate(closures)]


# ---- what is called ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "points"), [(zo_core.MeZO, 2), (zo_core.FZOO, 2), (zo_core.HiZOO, 3), (zo_core.SPSA, 3)]
)
def test_every_point_of_a_probe_is_on_its_own_closure(method, points):
    model, calls = network(), []
    opt = method(model, lr=1e-3, probes=3, engine="inplace")
    opt.step(logged(batches(model, 3), calls))
    assert calls == [k for k in range(3) for _ in range(points)]


def test_the_grouped_engine_calls_each_closure_once():
    model, calls = network(), []
    opt = zo_core.FZOO(model, lr=1e-3, probes=3, engine="grouped")
    opt.step(logged(batches(model, 3), calls))
    calls.clear()
    opt.step(logged(batches(model, 3), calls))
    assert calls == [0, 1, 2]


@pytest.mark.parametrize("engine", ["shadow", "inplace", "grouped"])
def test_a_list_of_one_batch_is_one_closure(engine):
    one, other = network(), network()
    alone, listed = (zo_core.SPSA(m, lr=1e-2, eps=1e-2, probes=3, engine=engine, seed=1) for m in (one, other))
    for _ in range(3):
        assert float(listed.step([loss_of(other)] * 3)) == pytest.approx(float(alone.step(loss_of(one))), rel=1e-5)
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_losses_that_differ_between_closures_alone_count_as_flat():
    opt = zo_core.MeZO(network(), lr=1e-3, probes=3)
    for _ in range(2):
        opt.step([lambda k=k: float(k) for k in range(3)])
    assert opt.flat == 2


@pytest.mark.parametrize("engine", ["shadow", "inplace"])
def test_all_evaluations_see_the_same_dropout_and_buffers_and_the_last_one_s_stay(engine):
    model = network(dropout=0.5, norm=True)
    opt = zo_core.FZOO(model, lr=0.0, probes=3, engine=engine)
    closures, buffers, states = batches(model, 3), [], []

    def watch(k):
        def closure():
            buffers.append(model[2].running_mean.clone())
            states.append(torch.get_rng_state())
            return closures[k]()

        return closure

    with torch.random.fork_rng():
        opt.step([watch(k) for k in range(3)])
        assert same(buffers, buffers[:1] * len(buffers)) and same(states, states[:1] * len(states))
        left, state = model[2].running_mean.clone(), torch.get_rng_state()
        model[2].running_mean.copy_(buffers[0])
        torch.set_rng_state(states[0])
        closures[2]()
        assert torch.allclose(model[2].running_mean, left, atol=1e-3) and torch.equal(torch.get_rng_state(), state)
        assert not torch.equal(left, buffers[0])


def test_a_journal_replays_steps_of_many_batches(tmp_path):
    model, start = network(), network()
    opt = zo_core.FZOO(model, lr=1e-2, probes=3, reuse=True)
    opt.journal = zo_core.Journal.create(tmp_path / "run.zoj", opt)
    for _ in range(4):
        opt.step(batches(model, 3))
    opt.journal.close()
    zo_core.replay(start, tmp_path / "run.zoj")
    assert same(weights(start), weights(model)) and not same(weights(start), weights(network()))


# ---- what goes wrong ---------------------------------------------------------------------------------------------


def test_what_is_no_list_of_as_many_functions_is_refused_before_anything_moves():
    model = network()
    opt = zo_core.FZOO(model, lr=1e-2, probes=3)
    closures, calls = batches(model, 3), []
    closures = logged(closures, calls)
    for wrong, kind, words in (
        (closures[:2], ValueError, "closure: expected 3 functions, one for each of the 3 probes, got 2: give as many"),
        ([], ValueError, "closure: expected 3 functions"),
        ([*closures[:2], 0.5], TypeError, "closure 2: expected a function that returns the loss, got 0.5"),
        (iter(closures), TypeError, "closure: expected a function that returns the loss, or a list of them"),
        (None, TypeError, "closure: expected a function that returns the loss, or a list of them"),
    ):
        with pytest.raises(kind, match=words):
            opt.step(wrong)
    assert not calls and same(weights(model), weights(network())) and opt.updates == opt.skipped == 0
    assert int(opt._own["stream"]) == 0


@pytest.mark.parametrize("engine", ["shadow", "inplace", "grouped"])
def test_an_exception_in_the_third_closure_leaves_everything_as_it_was(engine):
    model, other = network(dropout=0.1), network(dropout=0.1)
    opt, untroubled = (zo_core.FZOO(m, lr=1e-2, probes=3, engine=engine, seed=2) for m in (model, other))

    def fail():
        raise LookupError("no such batch")

    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(3)
        before = torch.get_rng_state()
        with pytest.raises(LookupError, match="no such batch"):
            opt.step([*batches(model, 2), fail])
        assert torch.equal(torch.get_rng_state(), before) and int(opt._own["stream"]) == 0
        near = {"atol": 1e-6 if engine == "inplace" else 0.0, "rtol": 0.0}
        for p, q in zip(weights(model), weights(other), strict=True):
            torch.testing.assert_close(p, q, **near)
        losses = [float(opt.step(batches(model, 3)))]
        torch.set_rng_state(before)
        losses.append(float(untroubled.step(batches(other, 3))))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for p, q in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(p, q, **{**near, "atol": 5 * near["atol"]})


def test_a_loss_of_one_closure_that_is_not_finite_skips_the_step():
    model = network()
    opt = zo_core.SPSA(model, lr=1e-2, probes=3)
    opt.step([*batches(model, 2), lambda: float("nan")])
    assert (opt.updates, opt.skipped) == (0, 1) and same(weights(model), weights(network()))


# ---- several processes -------------------------------------------------------------------------------------------


def train(method, parallel, closures, steps=4, **options):
    model = network()
    opt = method(model, lr=2e-2, processes=parallel, seed=7, **options)
    return [float(opt.step(closures(model))) for _ in range(steps)], weights(model)


METHODS = {"mezo": (zo_core.MeZO, {"probes": 6}), "fzoo-r": (zo_core.FZOO, {"probes": 4, "reuse": True})}


def train_on_own(parallel):
    """Each process has every second of the probes, and their batches."""
    found = {}
    for name, (method, options) in METHODS.items():
        n, share, shares = options["probes"], 0, 1
        if parallel is not None:
            share, shares = dist.get_rank(), dist.get_world_size()
        found[name] = train(method, parallel, lambda m, x=(n, share, shares): batches(m, x[0])[x[1] :: x[2]], **options)
    return found


def train_on_parts(parallel):
    """Each process has all probes, and half of the batch of each."""
    parts, part = (parallel.parts, parallel.part) if parallel is not None else (1, 0)

    def closure(model, k):
        here = slice(16 * k + 16 * part // parts, 16 * k + 16 * (part + 1) // parts)
        return lambda: (model(X[here]) - Y[here]).square().mean()

    return train(zo_core.FZOO, parallel, lambda m: [closure(m, k) for k in range(4)], probes=4)


def refused_together():
    """What is said when one process gives a list and the other a function, and of probes that cannot be shared."""
    model = network()
    opt = zo_core.MeZO(model, lr=1e-2, probes=4, processes=Parallel(data=1))
    with pytest.raises(RankError) as caught:
        opt.step(loss_of(model) if dist.get_rank() else batches(model, 2))
    with pytest.raises(ValueError, match="one for each of the 4 probes that are this process's, 1/2 of them, got 4"):
        opt.step(batches(model, 4))
    opt.param_groups[0]["probes"] = 3
    with pytest.raises(ValueError, match="probes: expected a multiple of 2, as so many processes share them"):
        opt.step(batches(model, 3))
    assert same(weights(model), weights(network()))
    return str(caught.value)


def in_processes():
    return train_on_own(Parallel(data=1)), train_on_parts(Parallel()), refused_together()


def test_processes_share_the_probes_and_their_batches_or_have_parts_of_each():
    own, (losses, values) = train_on_own(None), train_on_parts(None)
    for theirs, (part_losses, part_values), said in ranks.run(in_processes, 2):
        for name, (expected, reached) in own.items():
            assert theirs[name][0] == expected and same(theirs[name][1], reached), name
        assert part_losses == pytest.approx(losses, abs=1e-4)
        assert all(torch.allclose(p, q, atol=1e-3) for p, q in zip(part_values, values, strict=True))
        assert said.startswith("closures: expected the same in all ranks") and "one for each probe" in said
