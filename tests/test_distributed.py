"""Several processes take the steps of one: to the bit where the sums are the same; and what failures leave behind."""

import contextlib
import copy
import gc
import io
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import ranks
import torch
from conftest import on
from torch import distributed as dist
from torch import nn
from toys import loss_of
from zo_core.bindings import native

import zo_core
from zo_core.distributed import Exchange, Parallel, RankError
from zo_core.weights import checksum, sums

ROOT = Path(__file__).parent.parent


def network(dtype=torch.float32, dropout=0.0):
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 17), nn.Tanh(), nn.Dropout(dropout), nn.LayerNorm(17), nn.Linear(17, 1))
        return model.to(dtype)


def weights(model):
    return [p.detach().float().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def train(method, parallel, steps, dtype=torch.float32, dropout=0.0, **options):
    """Losses and weights of a run; bytes exchanged in its last step."""
    model = network(dtype, dropout)
    opt = method(model, processes=parallel, seed=7, **options)
    torch.random.default_generator.manual_seed(1)
    closure = loss_of(model, parallel.part, parallel.parts) if parallel else loss_of(model)
    losses = [float(opt.step(closure)) for _ in range(steps)]
    return losses, weights(model), opt.exchanged


# ---- the same as one process -------------------------------------------------------------------------------------


def train_both(parallel):
    return [train(zo_core.MeZO, parallel, 50, lr=2e-2, probes=2, engine=engine) for engine in ("shadow", "inplace")]


def test_data_parallel_is_one_process_with_the_whole_batch():
    alone, found = train_both(None), ranks.run(train_both, 4, Parallel())
    for rank in found:
        for (losses, _, _), (theirs, values, exchanged), first in zip(alone, rank, found[0], strict=True):
            torch.testing.assert_close(theirs, losses, atol=1e-4, rtol=0)
            assert theirs == first[0] and same(values, first[1]) and losses[-1] < 0.9 * losses[0]
            assert exchanged["step"] == 4 * 64  # of 4 ranks, a frame of four losses


PROBE_PARALLEL = {  # with more, with fewer points than ranks, and with numbers that are not float32
    "fzoo": (zo_core.FZOO, {"lr": 2e-2, "probes": 8}),
    "fzoo-r": (zo_core.FZOO, {"lr": 2e-2, "probes": 5, "reuse": True}),
    "mezo": (zo_core.MeZO, {"lr": 2e-2}),
    "mezo, bfloat16, dropout": (zo_core.MeZO, {"lr": 2e-2, "dtype": torch.bfloat16, "dropout": 0.2}),
    "hizoo": (zo_core.HiZOO, {"lr": 2e-2, "smoothing": 1e-2, "hessian": "factored"}),
    "adamezo": (zo_core.AdaMeZO, {"lr": 1e-2, "probes": 2, "window": 4}),
}


def train_all(parallel):
    return {name: train(method, parallel, 10, **options) for name, (method, options) in PROBE_PARALLEL.items()}


def test_probe_parallel_is_one_process_bit_for_bit():
    alone = train_all(None)
    for found in ranks.run(train_all, 4, Parallel(data=1)):
        for name, (losses, values, exchanged) in found.items():
            assert losses == alone[name][0] and same(values, alone[name][1]), name
            assert exchanged["step"] == 4 * 64


def test_both_are_data_parallel_bit_for_bit():
    options = {"lr": 2e-2, "probes": 3}
    (losses, values, _), _ = ranks.run(train, 2, zo_core.FZOO, Parallel(), 10, **options)
    for theirs, others, _ in ranks.run(train, 4, zo_core.FZOO, Parallel(data=2, probes=2), 10, **options):
        assert theirs == losses and same(others, values)


# ---- failures ----------------------------------------------------------------------------------------------------


def fail_once(parallel, engine):
    """A closure that raises in rank 2, once: the error, the weights before and after it and after five more steps."""
    model = network()
    opt = zo_core.FZOO(model, lr=2e-2, probes=8, engine=engine, processes=parallel, seed=7)
    closure = loss_of(model, parallel.part, parallel.parts)
    calls = 0

    def failing():
        nonlocal calls
        calls += 1
        if calls > 1 and dist.get_rank() == 2:
            raise ValueError("no such batch")
        return closure()

    opt.step(closure)
    before = weights(model)
    with pytest.raises((ValueError, RankError)) as caught:
        opt.step(failing)
    after = weights(model)
    for _ in range(5):
        opt.step(closure)
    assert opt.updates == 6
    return type(caught.value).__name__, str(caught.value), before, after, weights(model)


def fail_in_all_ways():
    ways = {"data": (Parallel(), "shadow"), "both": (Parallel(data=2), "shadow"), "inplace": (Parallel(), "inplace")}
    untroubled = {
        name: train(zo_core.FZOO, ways[name][0], 6, lr=2e-2, probes=8, engine="shadow")[1] for name in ("data", "both")
    }
    return {name: fail_once(*way) for name, way in ways.items()}, untroubled


def test_an_exception_in_one_rank_raises_in_all_and_costs_no_weight():
    found = ranks.run(fail_in_all_ways, 4)
    for rank, (ways, untroubled) in enumerate(found):
        for name, (kind, text, before, after, end) in ways.items():
            expected = ("RankError", "step 1: rank 2 failed: ValueError: no such batch")
            assert (kind, text) == (("ValueError", "no such batch") if rank == 2 else expected)
            assert same(after, found[0][0][name][3]) and same(end, found[0][0][name][4])
            if name == "inplace":
                assert all(map(torch.allclose, after, before))
            else:
                assert same(after, before) and same(end, untroubled[name])


def nan_in_one():
    model = network()
    opt = zo_core.MeZO(model, lr=2e-2, processes=Parallel())
    before = weights(model)
    opt.step(lambda: float("nan") if dist.get_rank() == 1 else 1.0)
    return opt.skipped, same(before, weights(model))


def test_a_loss_that_is_not_finite_in_one_rank_skips_the_step_in_all():
    assert ranks.run(nan_in_one, 2) == [(1, True)] * 2


def run_until_killed(folder, keeps, steps, kill_at=None):
    """Steps; rank 0 keeps a state every three, or a journal; rank 1 kills itself. Goes on from what is there."""
    rank, model = dist.get_rank(), network(torch.bfloat16)
    opt = zo_core.MeZO(model, lr=1e-3, processes=Parallel(timeout=180), seed=3)
    saved = Path(folder, keeps)
    if keeps == "journal" and saved.exists():
        opt.journal = zo_core.Journal.recover(saved, opt, writable=rank == 0)
        if rank:
            opt.journal = None
    elif saved.exists():
        found = torch.load(saved)
        model.load_state_dict(found["model"])
        opt.load_state_dict(found["opt"])
    dist.barrier()  # all have looked before there is a file
    closure = loss_of(model, rank, dist.get_world_size())
    if keeps == "journal" and rank == 0 and opt.journal is None:
        opt.journal = zo_core.Journal.create(saved, opt)
    try:
        while opt._own["steps"] < steps:
            if rank == 0 and keeps == "state" and opt._own["steps"] % 3 == 0:
                torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, saved)
            if rank == 1 and opt._own["steps"] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            opt.step(closure)
    except RankError as error:
        return str(error), opt.updates
    return weights(model), opt.updates


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody kills."""
    return ranks.run(run_until_killed, 3, str(tmp_path_factory.mktemp("whole")), "state", 9)


@pytest.mark.parametrize("keeps", ["state", "journal"])
def test_a_killed_rank_ends_the_others_and_the_run_goes_on(tmp_path, whole, keeps):
    found = ranks.run(run_until_killed, 3, str(tmp_path), keeps, 9, 5, seconds=90)  # its timeout is longer
    assert found[1] is None
    for text, updates in (found[0], found[2]):
        assert "lost the other processes" in text and updates == 5
    for (values, updates), (others, _) in zip(
        ranks.run(run_until_killed, 3, str(tmp_path), keeps, 9), whole, strict=True
    ):
        assert updates == 9 and same(values, others)


def leave_the_loop():
    model = network()
    opt = zo_core.MeZO(model, lr=1e-3, processes=Parallel(timeout=2))
    opt.step(loss_of(model))
    if dist.get_rank() == 1:
        time.sleep(7)  # alive, and silent
        return ""
    with pytest.raises(RankError) as caught:
        opt.step(loss_of(model))
    return str(caught.value)


def test_a_silent_rank_ends_the_others_in_time():
    assert "took more than 2 s" in ranks.run(leave_the_loop, 2)[0]


# ---- checks ------------------------------------------------------------------------------------------------------


def differ():
    """What is said when rank 1 has another option, weight, list of tensors or state."""
    rank, said = dist.get_rank(), {}

    def attempt(name, make, prepare=lambda opt, model: None):
        model = network()
        opt = make(model)
        prepare(opt, model)
        before = weights(model)
        with pytest.raises(RankError) as caught:
            opt.step(loss_of(model))
        said[name] = str(caught.value)
        assert same(before, weights(model)) and opt.updates + opt.skipped in (0, 4)

    def optimizer(model, **options):
        return zo_core.MeZO(model, processes=Parallel(), **{"lr": 1e-3, **options})

    def change(opt, model):
        with torch.no_grad():
            model[4].weight[0, 3] += 1e-3 * rank

    def counts(name):
        def change(opt, model):
            opt._own[name] += 4 * rank

        return change

    def blocks(m):
        return zo_core.LeZO(m, lr=1e-3, rho=0.5, blocks=[m[0], m[4]][:: 1 - 2 * rank], processes=Parallel())

    attempt("seed", lambda m: optimizer(m, seed=rank))
    attempt("names", lambda m: optimizer([*m[0].named_parameters()][:: 1 - 2 * rank], module=m))
    attempt("hidden", lambda m: optimizer([("seed", m[0].weight)], module=m, seed=rank))
    attempt("blocks", blocks)
    attempt("scales", lambda m: optimizer(m, scales={"4.weight": 1.0 + rank}))
    attempt("lr", lambda m: optimizer(m, lr=1e-3 * (1 + rank)))
    attempt("method", lambda m: optimizer(m) if rank else zo_core.LeZO(m, lr=1e-3, rho=0.0, processes=Parallel()))
    if len(native.isas()) > 1:
        with on("portable" if rank else native.get_isa()):
            attempt("backend", optimizer)
    attempt("tensors", lambda m: optimizer(m[0] if rank else m))
    attempt("weights", optimizer, change)
    attempt("steps", optimizer, counts("steps"))
    attempt("updates", optimizer, counts("updates"))
    return said


def test_ranks_that_do_not_agree_at_the_start_are_refused_by_name():
    for said in ranks.run(differ, 2):
        assert said["seed"] == "seed: expected the same in all ranks, got seed of 0 in rank 0; 1 in rank 1"
        assert "tensor 0" in said["names"] and "bias" in said["names"] and "weight" in said["names"]
        assert said["hidden"] == said["seed"] and said["blocks"].startswith("blocks: expected the same in all ranks")
        assert said["scales"].startswith("scales: expected the same in all ranks, got scales of [] in rank 0; [0.")
        assert "lr of group 0: " in said["lr"] and "0.001 in rank 0; 0.002 in rank 1" in said["lr"]
        assert "LeZO in rank 0; MeZO in rank 1" in said["method"]
        assert "float32 (17, 6) in rank 0" in said["tensors"]
        if "backend" in said:
            assert said["backend"].endswith("got backend of native in rank 0; native portable in rank 1")
        assert said["weights"].startswith("4.weight: differs between ranks at step 0, with checksums")
        assert said["steps"].startswith("step: expected the same in all ranks, got 0 in rank 0; 4 in rank 1")
        assert "[0] in rank 0; [4] in rank 1" in said["updates"]


def diverge():
    """Rank 2's weights change at step 3."""
    model = network(torch.bfloat16)
    opt = zo_core.MeZO(model, lr=1e-3, processes=Parallel(check_every=5))
    for step in range(20):
        if step == 3 and dist.get_rank() == 2:
            opt._own["residuals"][3][0] += 1
        try:
            opt.step(loss_of(model))
        except RankError as error:
            return step, str(error)


def test_ranks_that_diverge_are_detected():
    for step, said in ranks.run(diverge, 3):
        assert step == 5 and said.startswith("3.bias: differs between ranks at step 5") and "in ranks 0, 1" in said


def part_ways():
    """What is said when rank 1 loads a state, or changes an option, and rank 0 does not."""
    rank, said = dist.get_rank(), []

    def fails(change):
        model = network()
        opt = zo_core.MeZO(model, lr=1e-3, processes=Parallel())
        state = copy.deepcopy(opt.state_dict())
        opt.step(loss_of(model))
        if rank == 1:
            change(opt, state)
        with pytest.raises(RankError) as caught:
            opt.step(loss_of(model))
        said.append(str(caught.value))

    fails(lambda opt, state: opt._own.update(steps=2))
    fails(lambda opt, state: opt.load_state_dict(copy.deepcopy(opt.state_dict())))
    fails(lambda opt, state: opt.load_state_dict(state))
    fails(lambda opt, state: opt.param_groups[0].update(probes=5))
    fails(lambda opt, state: opt.param_groups[0].update(lr=2e-3))
    return said


def test_ranks_that_part_ways_are_refused_in_all():
    for at, loaded, step, probes, lr in ranks.run(part_ways, 2):
        assert (
            lr == "lr of group 0: expected the same in all ranks, got lr of group 0 of 0.001 in rank 0; 0.002 in rank 1"
        )
        assert at.startswith("step: expected the same in all ranks, got 1 in rank 0; 2 in rank 1")
        assert loaded.startswith("comparison of weights: expected the same in all ranks, got False in rank 0; True")
        assert step.startswith("step: expected the same in all ranks, got 1 in rank 0; 0 in rank 1")
        assert probes.startswith("number of evaluations: expected the same in all ranks, got 2 in rank 0; 10 in rank 1")


def one_more_probe():
    """Of three that share the points of a step, one makes 11 of them, the others 10: four are the most for each."""
    model = network()
    opt = zo_core.FZOO(model, lr=1e-3, probes=9, processes=Parallel(data=1))
    opt.step(loss_of(model))
    opt.param_groups[0]["probes"] = 10 if dist.get_rank() == 1 else 9
    with pytest.raises(RankError) as caught:
        opt.step(loss_of(model))
    return str(caught.value)


def test_shares_of_one_size_of_different_steps_are_refused():
    for text in ranks.run(one_more_probe, 3):
        assert text.startswith(
            "number of evaluations: expected the same in all ranks, got 10 in ranks 0, 2; 11 in rank 1"
        )


def fail_to_compare():
    """Memory runs out in rank 1's comparison, and the run goes on; then it is interrupted inside a message."""
    rank, model = dist.get_rank(), network()
    opt = zo_core.FZOO(model, lr=1e-3, processes=Parallel(timeout=5))
    opt.step(loss_of(model))

    def fail(*_):
        raise MemoryError("no room")

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr("zo_core.weights.checksum", fail)
        with pytest.raises((MemoryError, RankError), match="no room"):
            opt.compare()
    opt.step(loss_of(model))
    with pytest.MonkeyPatch.context() as patch:
        gather = Exchange._gather

        def interrupted(self, message):
            gather(self, message)
            raise KeyboardInterrupt

        if rank == 1:
            patch.setattr(Exchange, "_gather", interrupted)
        with pytest.raises((KeyboardInterrupt, RankError)):
            opt.step(loss_of(model))
    with pytest.raises(RankError, match="broken off before" if rank == 1 else "lost the other|broken off"):
        opt.compare()
    return opt.updates


def test_what_fails_between_messages_ends_no_process():
    assert ranks.run(fail_to_compare, 2) == [2, 2]


def many_optimizers():
    """Files and threads before and after thirty optimizers."""

    def count():
        gc.collect()
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    counts = []
    for _ in range(30):
        model = network()
        zo_core.MeZO(model, lr=1e-3, processes=Parallel()).step(loss_of(model))
        counts.append(count())
    return counts[4], counts[-1]


def test_groups_are_given_back():
    for before, after in ranks.run(many_optimizers, 2):
        assert after[0] <= before[0] + 2 and after[1] <= before[1] + 2


@pytest.mark.parametrize("of", [partial(checksum, 0), lambda t: tuple(sums(t).tolist())], ids=["checksum", "sums"])
def test_checksums_tell_tensors_apart(of):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.arange(3_000_000).sin().to(dtype)
        y = x.clone()
        y[2_500_000] += 1
        found = [of(x), of(y), of(x[:-1]), of(x.view(3, -1).flip(0).contiguous())]
        assert len(set(found)) == 4 and of(x.clone()) == found[0]
    assert of(x[:0]) == of(x[:0].clone()) and checksum(1, x) != checksum(0, x)


# ---- arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"data": 0}, {"probes": 1.5}, {"data": True}, {"check_every": None}, {"check_every": 0}, {"timeout": 0}]
)
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Parallel(**options)


def arguments():
    model = network()
    with pytest.raises(ValueError, match="data \\* probes to be the number of ranks, 2, got data=3, probes=1"):
        zo_core.MeZO(model, lr=1e-3, processes=Parallel(data=3, probes=1))
    with pytest.raises(ValueError, match="probes=1 with engine='inplace', got 2"):
        zo_core.MeZO(model, lr=1e-3, engine="inplace", processes=Parallel(probes=2))
    assert Parallel().parts == 2 and Parallel().part == dist.get_rank()
    assert Parallel(probes=2).parts == 1 and Parallel(data=1).grid() == (1, 2) and Parallel(data=1).part == 0
    opt = zo_core.MeZO(model, lr=1e-3, processes=Parallel())
    assert opt.exchanged == {"step": 0, "all": 0}
    opt.step(loss_of(model))
    first = opt.exchanged
    opt.step(loss_of(model))
    assert opt.exchanged == {"step": 128, "all": first["all"] + 128}
    again = copy.deepcopy(opt)
    again.step(loss_of(again.module))  # over a group of its own
    alone = zo_core.MeZO(model, lr=1e-3)
    if dist.get_rank() == 0:
        alone.step(loss_of(model))  # nobody else needs to
    return alone.exchanged


def test_arguments_are_checked_and_bytes_are_counted():
    assert ranks.run(arguments, 2) == [{"step": 0, "all": 0}] * 2


def test_without_torch_distributed_it_is_refused():
    with pytest.raises(TypeError, match="processes: expected zo_core.distributed.Parallel"):
        zo_core.MeZO(network(), lr=1e-3, processes=True)
    with pytest.raises(RuntimeError, match="call init_process_group first"):
        zo_core.MeZO(network(), lr=1e-3, processes=Parallel())


# ---- the page, launchers ---------------------------------------------------------------------------------------------------


def run_the_page():
    """The first code of docs/distributed.md, in a group that has been made."""
    code = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    names = {}
    with torch.random.fork_rng(), contextlib.redirect_stdout(io.StringIO()):
        torch.random.default_generator.manual_seed(0)
        exec(code.replace("dist.init_process_group()", ""), names)
    return float(names["loss"]), names["opt"].exchanged


def test_the_page():
    for loss, exchanged in ranks.run(run_the_page, 2):
        assert loss < 0.9 and exchanged["step"] == 2 * 64


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": [
        *("accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    ],
}


@pytest.mark.parametrize(("launcher", "option"), [("torchrun", "--shard"), ("accelerate", "--parts=2")])
def test_the_example_runs_under_a_launcher(launcher, option):
    command = [
        sys.executable,
        "-m",
        *LAUNCHERS[launcher],
        ROOT / "examples" / "distributed.py",
        "--steps",
        "11",
        option,
    ]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and "weights and state of all processes agree" in done.stdout, done.stderr
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in done.stdout.splitlines() if "loss" in line]
    assert losses[-1] < losses[0] and "step 10: loss" in done.stdout and "208 bytes exchanged" in done.stdout
