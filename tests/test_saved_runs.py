"""Journals and checkpoints that an earlier version of the library wrote are read by this one."""

import shutil
import warnings

import pytest
import torch
from saved_runs import DATA, RUNS, SAVED_AT, STEPS, Toy, go_on, optimizer_of

import zo_core
from zo_core import Journal
from zo_core.optim.state import of_entries

pytestmark = pytest.mark.parametrize("name", RUNS)


def check(model, end, exact):
    """The same bits on the backend of the saved run; on another one the same to rounding."""
    for p, q in zip(model.parameters(), end.values(), strict=True):
        assert torch.equal(p, q) if exact else torch.allclose(p, q, atol=1e-5 if p.dtype == torch.float32 else 2e-2)


def same_backend(journal):
    return journal.header.backend == zo_core.journal.backend_of(torch.device("cpu"))


def test_a_journal_is_replayed_to_the_weights_of_its_run(name):
    journal, end = Journal.open(DATA / f"{name}.zoj"), torch.load(DATA / f"{name}.pt")["end"]
    model = Toy(RUNS[name][1])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="replay agrees with the run to rounding")
        assert zo_core.replay(model, journal) == STEPS == len(journal)
    check(model, end, same_backend(journal) and journal.header.engine != "inplace")


def test_a_checkpoint_and_its_journal_go_on_to_the_bytes_of_the_run(name, tmp_path):
    path, saved = tmp_path / "run.zoj", torch.load(DATA / f"{name}.pt", weights_only=True)
    shutil.copy(DATA / f"{name}.zoj", path)
    model = Toy(RUNS[name][1])
    model.load_state_dict(saved["model"])
    opt = optimizer_of(name, model)
    opt.load_state_dict(saved["optimizer"])
    assert (opt.updates, opt.skipped, opt.seed) == (SAVED_AT - 1, 1, 2**63 + 5)
    opt.journal = Journal.resume(path, opt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would say that residuals do not belong to the weights
        go_on(model, opt, SAVED_AT, STEPS)
    exact = same_backend(opt.journal)
    check(model, saved["end"], exact)
    opt.journal.close()
    if exact:
        assert path.read_bytes() == (DATA / f"{name}.zoj").read_bytes()


def test_a_checkpoint_of_today_is_by_parameter_and_has_what_the_old_one_has(name):
    saved = torch.load(DATA / f"{name}.pt", weights_only=True)
    model = Toy(RUNS[name][1])
    model.load_state_dict(saved["model"])
    opt, again = optimizer_of(name, model), optimizer_of(name, model)
    opt.load_state_dict(saved["optimizer"])
    state = opt.state_dict()
    assert list(state["state"]) == list(range(len(list(model.parameters()))))
    again.load_state_dict(state)
    assert str(again.state_dict()) == str(state) and str(of_entries(state)) == str(
        {k: of_entries(saved["optimizer"])[k] for k in of_entries(state)}
    )


def test_a_run_made_now_leaves_the_bytes_that_it_left_then(name, tmp_path):
    old = Journal.open(DATA / f"{name}.zoj")
    model = Toy(RUNS[name][1])
    opt = optimizer_of(name, model)
    opt.journal = Journal.create(tmp_path / "run.zoj", opt)
    go_on(model, opt, 0, STEPS)
    state, expected = opt.state_dict(), torch.load(DATA / f"{name}.pt")["optimizer"]
    assert of_entries(state).keys() == of_entries(expected).keys()
    newer = {"momentum", "window", "beta"}  # which came later: an old state leaves them to the optimizer that loads it
    assert state["param_groups"][0].keys() - newer == expected["param_groups"][0].keys()
    if same_backend(old):
        assert [str(record) for record in opt.journal] == [str(record) for record in old]
