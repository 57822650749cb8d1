"""Momentum over past probes: what is kept between steps, what a journal has of it, and what is refused; test_twins.py has the steps."""

import math

import pytest
import torch
from test_twins import network
from toys import loss_of, same

import zo_core
from zo_core import Journal, JournalError

RUNS = {  # method and options, all with blocks left out, and with a step that is skipped
    "mezo": (zo_core.MeZO, {"lr": 1e-2, "probes": 2}),
    "fzoo-r, factored": (zo_core.FZOO, {"lr": 1e-2, "probes": 3, "reuse": True, "distribution": "factored"}),
    "hizoo": (zo_core.HiZOO, {"lr": 1e-2, "smoothing": 1e-2}),
    "hizoo-l": (zo_core.HiZOO, {"lr": 1e-2, "smoothing": 1e-2, "hessian": "factored"}),
    "adamezo": (zo_core.AdaMeZO, {"lr": 1e-2, "probes": 2, "dtype": torch.bfloat16, "eps": 0.1}),
    "adamezo, signs": (zo_core.AdaMeZO, {"lr": 1e-2, "distribution": "rademacher"}),
}
ALL = pytest.mark.parametrize("name", RUNS)


def made(name, **more):
    method, options = RUNS[name]
    options = {"momentum": 0.8, "window": 4, "rho": 0.5, "seed": 3, **options, **more}
    model = network(options.pop("dtype", torch.float32))
    return model, method(model, **options)


def steps(model, opt, first, last):
    """Steps from one number to another: the third has a loss that is no number, from the fifth on there are more probes."""
    for step in range(first, last):
        if step == 4:
            opt.param_groups[0]["probes"] += 1
        loss = loss_of(model)
        opt.step((lambda: torch.tensor(math.nan)) if step == 2 else loss)


@ALL
def test_a_journal_is_replayed_and_a_run_goes_on_from_it_or_from_a_state_to_the_same_bits(name, tmp_path):
    model, opt = made(name)
    opt.journal = Journal.create(tmp_path / "run.zoj", opt)
    steps(model, opt, 0, 6)
    saved, weights = opt.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    torch.save(saved, tmp_path / "state.pt")
    steps(model, opt, 6, 9)
    opt.journal.close()
    assert opt.skipped == 1 and opt.updates == 8

    base, _ = made(name)
    assert zo_core.replay(base, tmp_path / "run.zoj") == 9 and same(base, model)

    resumed, again = made(name, seed=0)
    resumed.load_state_dict(weights)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    steps(resumed, again, 6, 9)
    assert same(resumed, model) and again._snapshot().facts["past"] == opt._snapshot().facts["past"]

    recovered, once_more = made(name)
    once_more.param_groups[0]["probes"] = opt.probes
    once_more.journal = Journal.recover(tmp_path / "run.zoj", once_more)
    opt.journal = None
    steps(model, opt, 9, 11)
    steps(recovered, once_more, 9, 11)
    once_more.journal.close()
    assert same(recovered, model)


@pytest.mark.parametrize("method", [zo_core.MeZO, zo_core.FZOO])
def test_a_window_of_one_step_is_no_momentum(method):
    models = [network() for _ in range(3)]
    options = {}, {"momentum": 0.9, "window": 1}, {"momentum": 0.0, "window": 5}
    for model, more in zip(models, options, strict=True):
        opt = method(model, lr=1e-2, seed=3, **more)
        for _ in range(3):
            opt.step(loss_of(model))
        assert len(opt._own["past"].coeffs) == 0
    assert same(models[0], models[1]) and same(models[0], models[2])


def test_a_failure_leaves_the_past_as_it_was_and_a_skipped_step_counts_as_zero():
    model, opt = made("mezo", rho=0.0)
    steps(model, opt, 0, 2)
    before = opt._own["past"]

    def fails():
        raise ValueError("no batch")

    with pytest.raises(ValueError, match="no batch"):
        opt.step(fails)
    assert opt._own["past"] is before and before.coeffs.all()
    steps(model, opt, 2, 3)
    past = opt._own["past"]
    assert torch.equal(past.coeffs[:4], before.coeffs) and past.coeffs[4:].tolist() == [0, 0]
    assert past.streams.tolist() == list(range(6)) and [n for n, _ in past.steps] == [2, 2, 2]
    opt.param_groups[0]["window"] = 2
    steps(model, opt, 3, 4)
    assert opt._own["past"].streams.tolist() == [6, 7]


def test_processes_compare_the_past():
    model, opt = made("mezo")
    facts = opt._snapshot().facts["past"]
    steps(model, opt, 0, 1)
    assert facts != opt._snapshot().facts["past"]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"momentum": 1.0}, ValueError, "momentum: expected a finite number from 0 to 1, got 1.0"),
        ({"momentum": "much"}, TypeError, "momentum: expected a number"),
        ({"window": 0}, ValueError, "window: expected a finite number from 1 to 1024, got 0"),
        ({"window": 2.5}, ValueError, "window: expected an integer, got 2.5"),
        ({"beta2": 1.0}, ValueError, "beta2: expected"),
        ({"distribution": "factored", "rank": 2}, ValueError, "rank: expected 1, got 2: AdaMeZO's second moment"),
        ({"hessian": "diagonal"}, ValueError, "hessian: expected none"),
    ],
)
def test_options_out_of_range_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        zo_core.AdaMeZO(network(), lr=1e-2, **options)


def test_a_past_that_does_not_fit_is_refused(tmp_path):
    model, opt = made("mezo")
    opt.journal = Journal.create(tmp_path / "run.zoj", opt)
    steps(model, opt, 0, 3)
    opt.journal.close()
    state = opt.state_dict()
    zo = state["state"][0]["zo"]
    zo["carry"] = zo["carry"].replace('"streams": [0, ', '"streams": [')
    with pytest.raises(ValueError, match="as many streams as coefficients of past probes"):
        made("mezo")[1].load_state_dict(state)

    records = list(Journal.open(tmp_path / "run.zoj"))
    other, _ = made("mezo")
    damaged = Journal.create(tmp_path / "damaged.zoj", made("mezo")[1])
    for record in records[:2]:
        damaged.write(record._replace(past=record.past and record.past - 1))
    with pytest.raises(JournalError, match="step 1 goes along 1 probes of earlier steps from number 0 on"):
        zo_core.replay(other, damaged)


def test_the_command_line_and_trainer_have_it():
    config = pytest.importorskip("zo_core.integrations.config", reason="pydantic is not installed")
    opt = config.FinetuneConfig(method="adamezo", steps=1).optimizer(network())
    assert (type(opt), opt.momentum, opt.beta2, opt.window) == (zo_core.AdaMeZO, 0.7, 0.9, 10)
    given = config.FinetuneConfig(method="fzoo", momentum=0.9, window=5, steps=1)
    assert given.optimizer(network()).window == 5 and "--momentum 0.9 --window 5" in given.command()
    assert config.FinetuneConfig(method="mezo", steps=1).optimizer(network()).momentum == 0
    with pytest.raises(ValueError, match="beta2 is an option of adamezo; mezo has none"):
        config.FinetuneConfig(method="mezo", beta2=0.5, steps=1)
    trainer = pytest.importorskip("zo_core.integrations.transformers", reason="transformers is not installed")
    options = {"momentum": 0.9, "window": 5}
    assert trainer.ZOTrainingArguments("out", zo_options=options, use_cpu=True, report_to=[]).zo_options == options
