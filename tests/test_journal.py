"""The journal: runs made again from it bit for bit, runs that go on with it, and files that are not one."""

import copy
import json
import os
import re
import signal
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toys import X, Y, loss_of, same
from zo_core.bindings import ops

import zo_core
from zo_core import Journal, JournalError
from zo_core import journal as format_of
from zo_core.locks import lock


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 33), nn.LayerNorm(33), nn.Tanh(), nn.Linear(33, 1)).to(dtype)


def run(path, model: nn.Module, steps: int = 20, nan_at: int = 5, **options) -> zo_core.MeZO:
    """Steps under a schedule, one of them with a NaN; the journal is open at the end."""
    opt = zo_core.MeZO(model, **{"lr": 1e-2, "weight_decay": 0.1, "seed": 2**63 + 1, **options})
    opt.journal = Journal.create(path, opt)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))
    loss = loss_of(model)
    for step in range(steps):
        opt.step(loss if step != nan_at else lambda: float("nan"))
        schedule.step()
    return opt


# ---- replay ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"probes": 3}),
        (torch.bfloat16, {"residual": None}),
        (torch.bfloat16, {"residual": None, "stochastic_rounding": False}),
        (torch.bfloat16, {"residual": 8, "probes": 2}),
        (torch.bfloat16, {"residual": 16}),
        (torch.float16, {"residual": 8, "stochastic_rounding": False}),
    ],
)
def test_replay_is_the_run_bit_for_bit(backend, monkeypatch, tmp_path, distribution, dtype, options):
    monkeypatch.setattr(ops, "backend_for", lambda device: backend)
    model, base = network(dtype), network(dtype)
    opt = run(tmp_path / "run.zoj", model, distribution=distribution, **options)
    assert opt.skipped == 1 and not same(model, base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert zo_core.replay(base, tmp_path / "run.zoj") == 20
    assert same(model, base)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = network()
        self.first, self.last = layers[0], layers[3]
        self.blocks = nn.ModuleList(copy.deepcopy(nn.Sequential(layers[1], nn.Linear(33, 33))) for _ in range(4))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.blocks.parameters():
                p.normal_(0, 0.1, generator=generator)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.last(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("LeZO", {"rho": 0.5, "weight_decay": 0.1}),
        ("FZOO", {}),
        ("FZOO", {"reuse": True, "probes": 3, "rho": 0.5}),
        ("SPSA", {"probes": 3}),
        ("MEAZO", {}),
        ("BSZO", {"rho": 0.5}),
        ("HiZOO", {"smoothing": 1e-2}),
        ("HiZOO", {"smoothing": 1e-2, "rho": 0.5, "probes": 2, "weight_decay": 0.1}),
        ("HiZOO", {"smoothing": 1e-2, "hessian": "factored", "rho": 0.5}),
    ],
)
def test_runs_of_every_method_are_made_again(tmp_path, method, options, dtype):
    model, base = Blocks().to(dtype), Blocks().to(dtype)
    opt = getattr(zo_core, method)(model, lr=1e-3, eps=1e-2, seed=5, **options)
    opt.journal = Journal.create(tmp_path / "run.zoj", opt)
    for step in range(8):
        opt.step(loss_of(model) if step != 2 else lambda: float("nan"))
    records = list(opt.journal)
    assert len({r.left_out for r in records}) > 1 or not options.get("rho")
    assert opt.updates == 7 and not same(model, base)
    zo_core.replay(base, tmp_path / "run.zoj")
    assert same(model, base)

    with open(tmp_path / "run.zoj", "ab") as file:
        file.write(b"torn")
    (tmp_path / "other.zoj").write_bytes((tmp_path / "run.zoj").read_bytes())
    base = Blocks().to(dtype)
    other = getattr(zo_core, method)(base, lr=1e-3, eps=1e-2, seed=5, **options)
    other.journal = Journal.recover(tmp_path / "other.zoj", other)
    assert same(model, base) and (other.updates, other.skipped) == (7, 1)
    for optimizer, trained in ((opt, model), (other, base)):
        optimizer.journal.close()
        optimizer.journal = Journal.resume(optimizer.journal.path, optimizer)
        for _ in range(3):
            optimizer.step(loss_of(trained))
    assert same(model, base)
    assert (tmp_path / "run.zoj").read_bytes() == (tmp_path / "other.zoj").read_bytes()
    again = Blocks().to(dtype)
    assert zo_core.replay(again, tmp_path / "run.zoj") == 11 and same(model, again)


def test_any_step_of_many_can_be_made_again(tmp_path):
    model, states = network(), []
    opt = run(tmp_path / "run.zoj", model, steps=0)
    for _ in range(150):
        states.append(copy.deepcopy(model))
        opt.step(loss_of(model))
    seen = []
    for step in (0, 1, 63, 64, 65, 149):
        again = network()
        zo_core.replay(again, tmp_path / "run.zoj", upto=step, progress=lambda *done: seen.append(done))
        assert same(again, states[step]), step
    assert seen[-3:] == [(64, 149), (128, 149), (149, 149)]
    with pytest.raises(ValueError, match="upto: expected 0 to 150"):
        zo_core.replay(network(), tmp_path / "run.zoj", upto=151)


def test_probes_rounding_and_rates_may_change_and_be_nonsense_during_a_run(tmp_path):
    model, base = network(torch.bfloat16), network(torch.bfloat16)
    opt = run(tmp_path / "run.zoj", model, steps=2, nan_at=-1, residual=None)
    group = opt.param_groups[0]
    for changes in ({"probes": 3}, {"lr": 1e300}, {"lr": 1e-2, "probes": 2}, {"weight_decay": 0.0}):
        group |= changes
        opt.step(loss_of(model))
        opt.stochastic_rounding = not opt.stochastic_rounding
        opt.step(loss_of(model))
    assert opt.skipped == 2
    last = list(opt.journal)[-1]
    opt.journal.write(last._replace(step=10, moved=False))  # numbers of a step that did not move the weights
    assert zo_core.replay(base, tmp_path / "run.zoj") == 11
    assert same(model, base)


def test_groups_frozen_and_bare_tensors_mixed_dtypes(tmp_path):
    def make():
        model = network()
        model[0].to(torch.bfloat16)
        model[1].requires_grad_(False)
        return model

    model, base = make(), make()
    groups = [
        {"params": list(model[0].parameters()), "lr": torch.tensor(3e-2), "weight_decay": 0.5},
        {"params": [model[3].weight], "lr": 1e-3},
    ]
    opt = zo_core.MeZO(groups, lr=1.0, module=model, probes=2)
    opt.journal = Journal.create(tmp_path / "run.zoj", opt)

    def loss():
        return (model[3](model[1](model[0](X.bfloat16()).float())) - Y).square().mean()

    for _ in range(5):
        opt.step(loss)
    tensors = [*base[0].parameters(), base[3].weight]
    zo_core.replay(tensors, tmp_path / "run.zoj")
    assert same(model, base) and not torch.equal(base[0].weight, make()[0].weight)
    with pytest.raises(JournalError, match=r"base: group 0 tensor 0, group 0 tensor 1.* not there, there are 0.weight"):
        zo_core.replay(make(), tmp_path / "run.zoj")


def test_the_in_place_engine_and_other_backends_agree_to_rounding_and_say_so(tmp_path, monkeypatch):
    model, base = network(), network()
    run(tmp_path / "run.zoj", model, engine="inplace")
    with pytest.warns(UserWarning, match="to rounding, not bit for bit: the run's probes were made in place"):
        zo_core.replay(base, tmp_path / "run.zoj")
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(model.parameters(), base.parameters(), strict=True))
    model, base = network(), network()
    run(tmp_path / "other.zoj", model)
    monkeypatch.setattr(format_of, "backend_of", lambda device: "another")
    with pytest.warns(UserWarning, match="here it is 'another'"):
        zo_core.replay(base, tmp_path / "other.zoj")


def test_replay_refuses_what_the_run_did_not_start_from_and_touches_nothing(tmp_path):
    run(tmp_path / "run.zoj", network(), steps=2)
    other = network()
    with torch.no_grad():
        other[3].weight[0, 3] += 1e-7
    before = copy.deepcopy(other)
    for base, says in (
        (other, "base: expected weights with SHA-256 .*, from which the run started"),
        (network().half(), "base: 0.weight: expected float32 of shape"),
        (nn.Linear(6, 33), "base: 0.weight, 0.bias, 1.weight and 3 more of the journal are not there"),
        ([torch.zeros(3)], "base: expected 6 tensors as in the journal, got 1"),
    ):
        with pytest.raises(JournalError, match=says):
            zo_core.replay(base, tmp_path / "run.zoj")
    assert same(other, before)


# ---- writing and going on ----------------------------------------------------------------------------------------


def test_ten_thousand_steps_take_little_and_records_hold_what_was(tmp_path):
    model = network()
    opt = run(tmp_path / "run.zoj", model, steps=8, nan_at=3)
    size = (tmp_path / "run.zoj").stat().st_size
    opt.step(loss_of(model))
    assert 10_000 * ((tmp_path / "run.zoj").stat().st_size - size) < 600_000
    records = list(Journal.open(tmp_path / "run.zoj"))
    assert [r.step for r in records] == [r.stream for r in records] == list(range(9))
    assert [r.moved for r in records] == [step != 3 for step in range(9)]
    assert records[1].lr.tolist() == [np.float32(1e-2 / 2)] * 2
    assert records[1].decay.tolist() == [np.float32(1e-2 / 2 * 0.1), 0.0]  # biases and norms are not decayed
    assert np.isnan(records[3].loss) and records[4].loss == pytest.approx(0.5, abs=0.5)


SCRIPT = """
import sys, torch, zo_core
sys.path.insert(0, {tests!r})
from test_journal import network, loss_of
from zo_core import Journal
model = network()
opt = zo_core.MeZO(model, lr=1e-2)
opt.journal = Journal.create({path!r}, opt)
for step in range(10**9):
    opt.step(loss_of(model))
    if step == 10:
        torch.save((model.state_dict(), opt.state_dict()), {state!r})
        print("saved", flush=True)
"""


def test_killed_resumed_and_made_again(tmp_path):
    path, state = tmp_path / "run.zoj", tmp_path / "state.pt"
    script = SCRIPT.format(tests=os.path.dirname(__file__), path=str(path), state=str(state))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "saved\n"
    while len(Journal.open(path)) < 15:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    model = network()
    opt = zo_core.MeZO(model, lr=1e-2)
    weights, saved = torch.load(state)
    model.load_state_dict(weights)
    opt.load_state_dict(saved)
    killed_at = len(Journal.open(path))
    opt.journal = Journal.resume(path, opt)
    assert len(opt.journal) == 11 < killed_at
    for _ in range(10):
        opt.step(loss_of(model))
    whole, again = network(), network()
    plain = zo_core.MeZO(whole, lr=1e-2)
    for _ in range(21):
        plain.step(loss_of(whole))
    assert zo_core.replay(again, path) == 21
    assert same(again, model) and same(again, whole)


def test_a_step_that_fails_leaves_no_record_and_one_without_a_record_does_not_happen(tmp_path, monkeypatch):
    model = network()
    opt = run(tmp_path / "run.zoj", model, steps=3)
    before = copy.deepcopy(model)

    def broken():
        raise KeyError("no data")

    with pytest.raises(KeyError):
        opt.step(broken)
    assert len(opt.journal) == 3
    file = opt.journal._file

    class Full:
        def write(self, data):
            return file.write(data[:7])

        def __getattr__(self, name):
            return getattr(file, name)

    opt.journal._file = Full()
    with pytest.raises(OSError, match="7 of 56 bytes of a record could be written: is the disk full"):
        opt.step(loss_of(model))
    assert same(model, before) and opt.updates == 3
    opt.journal._file = file
    assert (len(Journal.open(tmp_path / "run.zoj")), Journal.open(tmp_path / "run.zoj").dropped) == (3, 0)
    opt.step(loss_of(model))
    again = network()
    assert zo_core.replay(again, tmp_path / "run.zoj") == 4 and same(again, model)


def test_an_optimizer_set_back_sets_its_journal_back(tmp_path):
    model = network()
    opt = run(tmp_path / "run.zoj", model, steps=3)
    kept = copy.deepcopy((model.state_dict(), opt.state_dict()))
    for _ in range(4):
        opt.step(loss_of(model))
    model.load_state_dict(kept[0])
    opt.load_state_dict(kept[1])
    opt.step(loss_of(model))
    again = network()
    assert zo_core.replay(again, tmp_path / "run.zoj") == 4 and same(again, model)


def test_resume_and_create_refuse_what_does_not_fit(tmp_path):
    path = tmp_path / "run.zoj"
    opt = run(path, network(), steps=3)
    with pytest.raises(FileExistsError, match=r"Journal\.resume"):
        Journal.create(path, zo_core.MeZO(network(), lr=1.0))
    with pytest.raises(JournalError, match="expected one that has not stepped, got 3"):
        Journal.create(tmp_path / "new.zoj", opt)
    opt.journal.close()
    seed = {"lr": 1.0, "seed": 2**63 + 1}
    changed, small = network(), network()
    with torch.no_grad():
        changed[0].bias += 1
    small[1].requires_grad_(False)
    for wrong, says in (
        (zo_core.MeZO(network(), lr=1.0), "seed: expected 9223372036854775809 as in the journal, got 0"),
        (zo_core.MeZO(network(), distribution="rademacher", **seed), "distribution: expected 'gaussian'"),
        (zo_core.MeZO(network(), residual=16, **seed), "residual: expected 8"),
        (zo_core.MeZO(network(), engine="inplace", **seed), "engine: expected 'shadow'"),
        (zo_core.MeZO(network(torch.bfloat16), **seed), r"tensors: expected .*0.weight.*float32.* got .*bfloat16"),
        (zo_core.MeZO(small, **seed), "tensors: 1.weight, 1.bias of the journal are not there"),
        (zo_core.MeZO(changed, **seed), "base: expected"),
    ):
        with pytest.raises(JournalError, match=says):
            Journal.resume(path, wrong)
    assert len(Journal.open(path)) == 3
    with pytest.raises(JournalError, match="expected one that has not stepped"):
        Journal.recover(path, opt)
    with pytest.raises(JournalError, match="base: expected"):
        Journal.recover(path, zo_core.MeZO(changed, **seed))
    with Journal._for(path, opt) as opt.journal:
        opt.journal._cut(2)
    opt.journal.close()
    with pytest.raises(JournalError, match="records of all 3 steps that the optimizer has taken, got 2"):
        Journal.resume(path, opt)
    opt.journal = Journal(path, writable=True)
    with pytest.raises(JournalError, match="expected step 2 next, got step 3"):
        opt.step(loss_of(opt.module))
    with pytest.raises(JournalError, match="for reading only"):
        Journal.open(path).write(next(iter(opt.journal)))


def test_a_group_added_later_is_refused_before_it_moves(tmp_path):
    model = network()
    opt = zo_core.MeZO([{"params": model[0].parameters()}], lr=1e-2, module=model)
    opt.journal = Journal.create(tmp_path / "run.zoj", opt)
    opt.step(loss_of(model))
    opt.add_param_group({"params": model[3].parameters()})
    before = copy.deepcopy(model)
    with pytest.raises(JournalError, match="group 1 tensor 0, .* are trained but not in the journal"):
        opt.step(loss_of(model))
    assert same(model, before)


def test_one_writer_at_a_time_and_another_one_when_it_has_closed(tmp_path):
    path = tmp_path / "run.zoj"
    opt = run(path, network(), steps=3)
    other, fresh = run(tmp_path / "other.zoj", network(), steps=3), zo_core.MeZO(network(), lr=1.0, seed=2**63 + 1)
    whole = path.read_bytes()
    for again in (lambda: Journal.resume(path, other), lambda: Journal.recover(path, fresh)):
        with pytest.raises(JournalError, match="is open for writing already"):
            again()
    script = f"from zo_core import Journal; Journal({str(path)!r}, writable=True)"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "run.zoj: is open for writing already" in process.stderr
    reader = Journal.recover(path, fresh, writable=False)
    assert path.read_bytes() == whole and len(reader) == 3 and same(fresh.module, opt.module)
    fresh = zo_core.MeZO(network(), lr=1.0)
    opt.journal.close()
    Journal.resume(path, other).close()
    with open(tmp_path / "new.zoj.part", "ab") as part:  # somebody else makes the same one
        assert lock(part)
        with pytest.raises(JournalError, match="is open for writing already"):
            Journal.create(tmp_path / "new.zoj", fresh)
    path.write_bytes(b"none")
    with pytest.raises(JournalError, match="the file is none") as error:
        Journal.resume(path, other)
    with open(path, "ab") as file:  # it was closed
        assert lock(file)
    assert error.traceback


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda opt: opt.module.bfloat16(), r"tensors: expected .*float32.* as in the journal, got .*bfloat16"),
        (lambda opt: opt.load_state_dict(zo_core.MeZO(network(), lr=1.0).state_dict()), "seed: expected 9223"),
        (lambda opt: opt._own.update(distribution="rademacher"), "distribution: expected 'gaussian'"),
        (lambda opt: setattr(opt, "_asked", "inplace"), "engine: expected 'shadow'"),
    ],
)
def test_a_step_that_replay_could_not_make_is_refused_before_it_moves(tmp_path, change, says):
    model = network()
    opt = run(tmp_path / "run.zoj", model, steps=3)
    change(opt)
    before = copy.deepcopy(model)
    with pytest.raises(JournalError, match=says):
        opt.step(loss_of(model))
    assert same(model, before) and len(Journal.open(tmp_path / "run.zoj")) == 3


def test_another_optimizer_s_journal_and_what_is_no_journal_are_refused(tmp_path):
    model, other = network(), network()
    opt = run(tmp_path / "run.zoj", model, steps=0)
    for wrong, says in (
        (zo_core.FZOO(other, lr=1.0, seed=2**63 + 1, distribution="gaussian"), "method: expected 'MeZO'"),
        (zo_core.MeZO(other, lr=1.0), "seed: expected 9223372036854775809"),
    ):
        wrong.journal = opt.journal
        with pytest.raises(JournalError, match=says):
            wrong.step(loss_of(other))
    wrong.journal = "run.zoj"
    with pytest.raises(TypeError, match=r"journal: expected Journal.create\(path, optimizer\), got 'run.zoj'"):
        wrong.step(loss_of(other))
    assert same(other, network()) and len(opt.journal) == 0


def test_a_journal_that_someone_empties_ends_in_a_journal_error(tmp_path):
    model = network()
    opt = run(tmp_path / "run.zoj", model, steps=3)
    before = copy.deepcopy(model)
    os.truncate(tmp_path / "run.zoj", 0)
    for use in (lambda: opt.step(loss_of(model)), lambda: list(opt.journal)):
        with pytest.raises(JournalError, match="was cut by someone else"):
            use()
    assert same(model, before) and opt.updates == 3


def test_tensors_of_one_name_get_no_journal(tmp_path):
    parts = network(), network()
    groups = [{"params": list(part.named_parameters())} for part in parts]
    opt = zo_core.MeZO(groups, lr=1e-2)
    with pytest.raises(JournalError, match=r"0.weight, .* are names of several tensors"):
        Journal.create(tmp_path / "run.zoj", opt)
    assert list(tmp_path.iterdir()) == []


def test_the_page_s_code_runs_as_it_stands_there(tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "journal.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", page, re.S)[1], names)
    assert same(names["base"], names["model"]) and not same(names["base"], names["halfway"])


# ---- files that are not one --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("journal") / "run.zoj"
    run(path, network(), steps=6)
    return path.read_bytes()


def encoded(journal: Journal) -> list[bytes]:
    return [format_of._encode(r, journal.header, 0) for r in journal]


def header_end(data: bytes) -> int:
    return 16 + struct.unpack_from("<I", data, 12)[0] + 4


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "file.zoj"


def read(path, data: bytes) -> list[bytes]:
    path.write_bytes(data)
    return encoded(Journal.open(path))


def test_a_torn_tail_is_dropped(whole, scratch):
    records = read(scratch, whole)
    assert len(records) == 6
    for cut in range(1, 60):
        assert read(scratch, whole[:-cut]) == records[: 5 if cut <= 56 else 4]
    for tail in (b"\0" * 4096, whole[-56:], b"x"):
        assert read(scratch, whole + tail) == records
        assert Journal.open(scratch).dropped == len(tail)


def test_a_record_of_another_place_or_journal_is_no_record(whole, scratch):
    end, (_, second, *_) = header_end(whole), read(scratch, whole)
    assert read(scratch, whole[:end] + whole[end + 56 :]) == []  # the first one is missing
    other = with_header(whole[16 : end - 4].replace(b"0.1.0", b"0.1.1"))
    assert read(scratch, other + whole[end:]) == []
    chained = second[:-4] + struct.pack("<I", zlib.crc32(second[:-4], struct.unpack("<I", whole[end - 4 : end])[0]))
    assert read(scratch, whole[:end] + chained) == []  # it is whole, but of step 1


@given(st.data())
def test_a_flipped_bit_or_a_cut_leaves_a_prefix_of_true_records_or_an_error(whole, scratch, data):
    true = read(scratch, whole)
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    if damaged:
        for _ in range(data.draw(st.integers(0, 3))):
            at = data.draw(st.integers(0, len(damaged) - 1))
            damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = read(scratch, bytes(damaged))
    except JournalError:
        assert bytes(damaged[: header_end(whole)]) != whole[: header_end(whole)]
    else:
        assert found == true[: len(found)]


def test_each_flipped_bit_of_a_record_is_found(whole, scratch):
    true = read(scratch, whole)
    for at in range(header_end(whole) + 56, header_end(whole) + 112):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << bit
            assert read(scratch, bytes(damaged)) == true[:1]


@given(st.binary(max_size=300))
def test_random_bytes_are_refused(scratch, data):
    for text in (data, format_of.MAGIC + data):
        with pytest.raises(JournalError):
            read(scratch, text)


def with_header(text: bytes) -> bytes:
    start = struct.pack("<8sII", format_of.MAGIC, 1, len(text)) + text
    return start + struct.pack("<I", zlib.crc32(start))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("float32"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@given(st.data())
def test_headers_with_wrong_fields_and_right_checksums_are_refused_or_harmless(whole, scratch, data):
    fields = json.loads(whole[16 : header_end(whole) - 4])
    name = data.draw(st.sampled_from([*fields, "another"]))
    if name == "tensors" and data.draw(st.booleans()):
        fields[name][1][data.draw(st.integers(0, 3))] = data.draw(JSON)
    else:
        fields[name] = data.draw(JSON)
    if name == "another":
        fields.pop("seed")
    try:
        scratch.write_bytes(with_header(json.dumps(fields).encode()))
        journal = Journal.open(scratch)
        assert len(journal) == 0
        zo_core.replay(network(), journal)
    except JournalError:
        pass


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"[" * 100_000, "header is not one"),
        (b'{"seed":' + b"9" * 10_000 + b"}", "header is not one"),
        (b"\xff\xfe", "header is not one"),
    ],
)
def test_hostile_headers_end_in_one_kind_of_error(scratch, text, says):
    with pytest.raises(JournalError, match=says):
        read(scratch, with_header(text))


@given(st.data(), st.integers(0, 35), st.integers(0, 5), st.sampled_from([0, 7, 2**62 - 9, 2**63, 2**64 - 1]))
def test_records_of_any_numbers_and_right_checksums_are_left_out_or_harmless(whole, scratch, data, flags, k, stream):
    start, size = whole[: header_end(whole)], 16 + 4 * k + (4 * k + 4) * bool(flags & 8) + bool(flags & 4)
    body = struct.pack("<IIQQd", flags, k, 0, stream, 0.5) + data.draw(st.binary(min_size=size, max_size=size))
    n, width = data.draw(st.integers(0, 9)), data.draw(st.sampled_from([0, 4, 8, 9]))
    if flags & 16:
        body += struct.pack("<II", n, width) + bytes(n * width)
    chain = struct.unpack("<I", start[-4:])[0]
    scratch.write_bytes(start + body + struct.pack("<I", zlib.crc32(body, chain)))
    found = Journal.open(scratch)
    right = flags < 32 and stream < 2**62 and (width in (4, 8) or not flags & 16)
    assert len(found) == right
    if right and not flags & 4:  # which may have bits of no tensor
        assert encoded(found) == [body + struct.pack("<I", zlib.crc32(body))]
    zo_core.replay(network(), found)


def test_hostile_lengths_allocate_nothing(whole, scratch):
    tracemalloc.start()
    refuse_hostile_lengths(whole, scratch)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 100 * 2**20  # of files up to 600 KB, decoded and encoded as JSON by this test as well


def refuse_hostile_lengths(whole, scratch):
    with pytest.raises(JournalError, match="cut off or damaged"):
        read(scratch, struct.pack("<8sII", format_of.MAGIC, 1, 0xFFFFFFFF) + bytes(100))
    fields = json.loads(whole[16 : header_end(whole) - 4])
    fields["tensors"][0][1] = [2**60] * 10_000
    scratch.write_bytes(with_header(json.dumps(fields).encode()))
    with pytest.raises(JournalError, match=r"base: 0.weight: expected float32 of shape"):
        zo_core.replay(network(), scratch)
    start = whole[: header_end(whole)]
    body = struct.pack("<IIQQd", 1, 0xFFFFFFF0, 0, 0, 0.0) + bytes(20)
    carry = struct.pack("<IIQQd", 16, 0, 0, 0, 0.0) + bytes(16) + struct.pack("<II", 0xFFFFFFFF, 0xFFFFFFFF)
    for record in (body, carry):
        crc = zlib.crc32(record, struct.unpack("<I", start[-4:])[0])
        assert read(scratch, start + record + struct.pack("<I", crc)) == []


def test_other_versions_are_refused_by_name(whole, scratch):
    with pytest.raises(JournalError, match="format version 2, this library reads 1"):
        read(scratch, whole[:8] + struct.pack("<I", 2) + whole[12:])
    fields = json.loads(whole[16 : header_end(whole) - 4]) | {"noise": 2, "library": "9.9"}
    with pytest.raises(JournalError, match=r"version 2 of the noise by zo_core '9.9', this one makes version 1"):
        read(scratch, with_header(json.dumps(fields).encode()))
