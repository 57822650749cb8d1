"""ZOTrainer: Trainer's loop with zeroth-order steps. What Trainer gives stays, no backward runs, runs resume bit for bit."""

import json
import os

import pytest
import ranks
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import distributed as dist
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import zo_core
from zo_core import calibration
from zo_core.distributed import Parallel
from zo_core.integrations.transformers import ZOTrainer, ZOTrainingArguments

SIZES = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def _own_generator():
    with torch.random.fork_rng():  # Trainer seeds torch's
        yield


def make(kind=LlamaForCausalLM, dropout=0.0, dtype=torch.float32):
    torch.random.default_generator.manual_seed(0)
    config = BertConfig(**SIZES) if kind is BertForSequenceClassification else LlamaConfig(**SIZES, pad_token_id=0)
    config.attention_dropout = config.attention_probs_dropout_prob = config.hidden_dropout_prob = dropout
    return kind(config).to(dtype)


def rows(n=24):
    """Token rows in which a different number of labels counts."""
    ids = torch.arange(n * 12).view(n, 12) * 7 % 60 + 1
    labels = ids.clone()
    for i in range(n):
        labels[i, : i % 9] = -100
    return [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]


def arguments(folder, cls=ZOTrainingArguments, **options):
    defaults = {"learning_rate": 1e-3, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no"}
    fixed = {"output_dir": str(folder), "report_to": [], "use_cpu": True, "disable_tqdm": True}
    return cls(**fixed, **{**defaults, **options})


class InOrder(ZOTrainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- the step -----------------------------------------------------------------------------------------------------------


def batches(data, size):
    parts = [data[i : i + size] for i in range(0, len(data), size)]
    return [{k: torch.stack([row[k] for row in part]) for k in part[0]} for part in parts]


def test_a_run_is_the_plain_loop_over_the_same_windows(tmp_path):
    model = make()
    args = arguments(
        tmp_path, gradient_accumulation_steps=3, num_train_epochs=2, seed=5, weight_decay=0.1, zo_options={"seed": 9}
    )
    trainer = InOrder(model, args, train_dataset=rows(20))
    trainer.train()  # five micro-batches an epoch: windows of 3 and 2

    plain, micro = make().train(), batches(rows(20), 4)
    opt = zo_core.MeZO(plain, lr=1e-3, weight_decay=0.1, seed=9)
    for i, window in enumerate([micro[:3], micro[3:]] * 2):
        opt.param_groups[0]["lr"] = 1e-3 * (4 - i) / 4

        def loss(window=window):
            items = sum((x["labels"][:, 1:] != -100).sum() for x in window)
            logits = torch.cat([plain(input_ids=x["input_ids"]).logits for x in window])
            labels = torch.cat([x["labels"] for x in window])
            following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
            return torch.nn.functional.cross_entropy(logits.transpose(1, 2), following, reduction="sum") / items

        opt.step(loss)
    moved = max((a - b).abs().max() for a, b in zip(weights(make()), weights(plain), strict=True))
    off = max((a - b).abs().max() for a, b in zip(weights(model), weights(plain), strict=True))
    assert moved > 1e-3
    counts_what_the_loss_does = hasattr(trainer, "_loss_shifts_labels")  # not so in transformers 5.0
    assert off < (1e-3 * moved if counts_what_the_loss_does else moved)


def test_every_probe_sees_the_whole_window(tmp_path):
    seen = []

    class Watched(InOrder):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(int(inputs["input_ids"][0, 0]))
            return super().compute_loss(model, inputs, *args, **kwargs)

    args = arguments(tmp_path, gradient_accumulation_steps=3, max_steps=1, probes=2)
    Watched(make(), args, train_dataset=rows()).train()
    first = [int(x["input_ids"][0, 0]) for x in batches(rows()[:12], 4)]
    assert seen == first * (2 * 2 + 1)  # two sides of two probes, and the check of the shadow engine


def test_micro_batches_are_the_probes_where_they_are_spread(tmp_path):
    """Five micro-batches an epoch, three probes: the last window of two goes round."""
    model, seen = make(), []

    class Watched(InOrder):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(int(inputs["input_ids"][0, 0]))
            return super().compute_loss(model, inputs, *args, **kwargs)

    args = arguments(
        tmp_path, gradient_accumulation_steps=3, num_train_epochs=1, zo_method="FZOO", engine="inplace", spread_probes=True,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Watched(model, args, train_dataset=rows(20))
    trainer.train()
    micro = batches(rows(20), 4)
    order = [x for x in (0, 1, 2, 3, 4, 3) for _ in range(2)]
    assert seen == [int(micro[i]["input_ids"][0, 0]) for i in order] and trainer.zo_optimizer.probes == 3

    plain = make().train()
    opt = zo_core.FZOO(plain, lr=1e-3, probes=3, seed=42, engine="inplace")

    def closure(x, window, weight):
        items = sum((y["labels"][:, 1:] != -100).sum() for y in window)
        following = torch.nn.functional.pad(x["labels"][:, 1:], (0, 1), value=-100)

        def loss():
            logits = plain(input_ids=x["input_ids"]).logits.transpose(1, 2)
            return weight * torch.nn.functional.cross_entropy(logits, following, reduction="sum") / items

        return loss

    first, last = micro[:3], micro[3:]
    losses = [float(opt.step([closure(x, first, 3) for x in first]))]
    losses.append(float(opt.step([closure(x, last, w) for x, w in zip([*last, last[0]], (1.5, 3, 1.5), strict=True)])))
    logged = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    counts_what_the_loss_does = hasattr(trainer, "_loss_shifts_labels")  # not so in transformers 5.0
    assert logged == pytest.approx(losses, rel=2e-4 if counts_what_the_loss_does else 0.2)
    moved = max((a - b).abs().max() for a, b in zip(weights(make()), weights(plain), strict=True))
    off = max((a - b).abs().max() for a, b in zip(weights(model), weights(plain), strict=True))
    assert moved > 1e-3 and off < moved * (0.01 if counts_what_the_loss_does else 1)


def test_probes_that_cannot_be_spread_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match="probes: expected gradient_accumulation_steps, 4, or None with spread_probes=True"
    ):
        arguments(tmp_path, gradient_accumulation_steps=4, probes=2, spread_probes=True)
    model, args = make(), arguments(tmp_path, gradient_accumulation_steps=4, spread_probes=True, max_steps=1)
    opt = zo_core.MeZO(model, lr=1e-3, probes=2)
    with pytest.raises(ValueError, match="probes: expected 4 with spread_probes=True, .* got 2"):
        ZOTrainer(model, args, train_dataset=rows(), optimizers=(opt, None)).train()
    assert same(weights(model), weights(make()))


@pytest.mark.parametrize("kind", [LlamaForCausalLM, LlamaForSequenceClassification, BertForSequenceClassification])
def test_micro_batches_are_weighted_as_trainer_weights_them(tmp_path, kind):
    data = (
        rows(20) if kind is LlamaForCausalLM else [{**x, "labels": torch.tensor(i % 2)} for i, x in enumerate(rows(20))]
    )
    logged = []
    for trainer, cls in ((Trainer, TrainingArguments), (ZOTrainer, ZOTrainingArguments)):
        more = {"eps": 1e-5} if trainer is ZOTrainer else {"optim": "sgd"}
        args = arguments(tmp_path, cls, gradient_accumulation_steps=3, learning_rate=0.0, num_train_epochs=2, **more)
        run = trainer(make(kind), args, train_dataset=data)
        run.train()
        logged.append([x["loss"] for x in run.state.log_history if "loss" in x])
    assert len(logged[0]) == 4 and logged[1] == pytest.approx(logged[0], rel=1e-4)


def test_no_backward_runs_and_no_gradient_exists(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.autograd, "backward", lambda *a, **k: pytest.fail("a backward"))
    trainer = ZOTrainer(make(dropout=0.1), arguments(tmp_path, max_steps=3), train_dataset=rows())
    trainer.train()
    assert all(p.grad is None for p in trainer.model.parameters())
    assert trainer.zo_optimizer.updates == 3
    assert not any("grad_norm" in x for x in trainer.state.log_history)


def test_the_logged_loss_is_the_steps(tmp_path):
    losses = []

    class Watched(ZOTrainer):
        def training_step(self, *args):
            losses.append(float(super().training_step(*args)))
            return torch.tensor(losses[-1])

    args = arguments(tmp_path, max_steps=4, gradient_accumulation_steps=2)
    trainer = Watched(make(), args, train_dataset=rows())
    result = trainer.train()
    logged = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    assert losses[::2] == [0.0] * 4 and logged == pytest.approx(losses[1::2], abs=1e-4)
    assert result.training_loss == pytest.approx(sum(losses) / 4)


def test_a_step_whose_loss_is_not_finite_moves_nothing_and_the_run_goes_on(tmp_path):
    class Broken(ZOTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * torch.nan if self.state.global_step == 1 else loss

    trainer = Broken(make(), arguments(tmp_path, max_steps=3), train_dataset=rows())
    trainer.train()
    assert (trainer.zo_optimizer.updates, trainer.zo_optimizer.skipped) == (2, 1)
    assert all(p.isfinite().all() for p in trainer.model.parameters())


# ---- what Trainer gives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("MeZO", torch.float32),
        ("MeZO", torch.bfloat16),
        ("LeZO", torch.bfloat16),
        ("HiZOO", torch.float32),
        ("FZOO", torch.bfloat16),
        ("SPSA", torch.float32),
    ],
)
def test_resume_is_bit_exact(tmp_path, method, dtype):
    def trainer(**more):
        args = arguments(
            tmp_path, max_steps=9, save_strategy="steps", save_steps=4, warmup_steps=2, zo_method=method, eps=1e-2,
            gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=3, lr_scheduler_type="cosine", **more,
        )  # fmt: skip
        return ZOTrainer(make(dropout=0.2, dtype=dtype), args, train_dataset=rows(), eval_dataset=rows(4))

    whole = trainer()
    whole.train()
    for checkpoint in (4, 8):  # within the second epoch, and within the third
        part = trainer()
        part.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))
        assert same(weights(whole.model), weights(part.model))
        assert same(whole.zo_optimizer._own["residuals"], part.zo_optimizer._own["residuals"])
        losses = [[x for x in t.state.log_history if "loss" in x] for t in (whole, part)]
        assert losses[0] == losses[1] and len(losses[0]) == 9
    assert not same(weights(whole.model), weights(make(dtype=dtype)))


def test_scales_are_measured_before_the_first_step_alone(tmp_path, monkeypatch):
    measure = calibration._measure

    def positive(*args):
        """A random model's traces are negative, which leaves all scales at 1."""
        return (found := measure(*args))._replace(curvatures=found.curvatures.abs())

    monkeypatch.setattr(calibration, "_measure", positive)
    options = {"calibrate": 30, "gradient_accumulation_steps": 2, "spread_probes": True, "eps": 1e-3}
    args = arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=1, **options)
    whole = InOrder(make(), args, train_dataset=rows())
    whole.train()
    found = whole.zo_optimizer.scales
    assert (
        len(set(found.values())) > 2
        and found["model.layers.0.mlp.up_proj.weight"] == found["model.layers.1.mlp.up_proj.weight"]
    )
    part = InOrder(make(), args, train_dataset=rows())
    part.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert same(weights(whole.model), weights(part.model)) and part.zo_optimizer.scales == found
    with pytest.raises(ValueError, match="calibrate: expected None, as zo_options has scales"):
        arguments(tmp_path, calibrate=30, zo_options={"scales": found})


def test_callbacks_evaluation_metrics_best_model_and_early_stopping(tmp_path):
    events = []

    class Watch(TrainerCallback):
        def on_event(self, name):
            events.append(name)

    for name in ("step_begin", "substep_end", "pre_optimizer_step", "optimizer_step", "step_end", "evaluate", "save"):
        setattr(Watch, f"on_{name}", lambda self, *args, name=name, **kwargs: self.on_event(name))

    def metrics(prediction):
        return {"score": float(len([e for e in events if e == "evaluate"]) == 0)}  # the first is the best

    args = arguments(
        tmp_path, max_steps=20, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=2, metric_for_best_model="score",
        save_strategy="steps", save_steps=2, load_best_model_at_end=True, learning_rate=0.05,
    )  # fmt: skip
    trainer = ZOTrainer(
        make(), args, train_dataset=rows(), eval_dataset=rows(4), compute_metrics=metrics,
        callbacks=[Watch(), EarlyStoppingCallback(early_stopping_patience=2)],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 6 and trainer.state.best_metric == 1.0
    step = ["step_begin", "substep_end", "pre_optimizer_step", "optimizer_step", "step_end"]
    assert events == [*step, *step, "evaluate", "save"] * 3
    best = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert same(weights(best), weights(trainer.model))


def test_labels_that_a_loss_function_takes_out_are_there_in_every_evaluation(tmp_path):
    def half(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    logs = []
    for function in (None, half):
        trainer = InOrder(make(), arguments(tmp_path, max_steps=2), train_dataset=rows(), compute_loss_func=function)
        trainer.train()
        logs.append([x["loss"] for x in trainer.state.log_history if "loss" in x])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def test_bf16_forwards_over_float32_weights(tmp_path):
    trainer = ZOTrainer(make(), arguments(tmp_path, max_steps=2, bf16=True), train_dataset=rows())
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert trainer.zo_optimizer.updates == 2


@pytest.mark.filterwarnings("ignore:.*read elsewhere")
@pytest.mark.parametrize("engine", ["shadow", "inplace"])
def test_compiled_models_are_trained_as_plain_ones(tmp_path, engine):
    runs = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        args = arguments(tmp_path, max_steps=2, engine=engine, **compiled)
        runs.append(InOrder(make(), args, train_dataset=rows()))
        runs[-1].train()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*(weights(r.model) for r in runs), strict=True))


def test_training_again_goes_on_with_the_optimizer(tmp_path):
    trainer = ZOTrainer(make(), arguments(tmp_path, max_steps=2), train_dataset=rows())
    trainer.train()
    trainer.train()
    assert trainer.zo_optimizer.updates == 4


# ---- arguments ------------------------------------------------------------------------------------------------------------


def test_fields_reach_the_optimizer(tmp_path):
    args = arguments(
        tmp_path, max_steps=1, eps=2e-3, probes=3, distribution="factored", rank=3, residual=16, engine="inplace", seed=7,
        weight_decay=0.2, zo_options={"stochastic_rounding": False},
    )  # fmt: skip
    trainer = ZOTrainer(make(dtype=torch.bfloat16), args, train_dataset=rows())
    opt = trainer.create_optimizer()
    assert (opt.eps, opt.probes, opt.engine, opt.seed, opt.stochastic_rounding) == (2e-3, 3, "inplace", 7, False)
    assert (opt._own["distribution"], opt._own["rank"]) == ("factored", 3) and opt._own["residuals"][
        0
    ].dtype == torch.int16
    assert opt.param_groups[0]["weight_decay"] == 0.2 and opt.param_groups[0]["lr"] == 1e-3


def test_fields_on_a_command_line(tmp_path):
    (args,) = HfArgumentParser(ZOTrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--zo_options", '{"stochastic_rounding": false}', "--eps", "0.01", "--use_cpu"]
    )
    assert args.zo_options == {"stochastic_rounding": False} and args.eps == 0.01 and args.learning_rate is None
    json.loads(args.to_json_string())


def test_a_method_is_found_by_its_name_in_the_package(tmp_path, monkeypatch):
    class Own(zo_core.MeZO):
        pass

    monkeypatch.setattr(zo_core, "Own", Own, raising=False)
    monkeypatch.setattr(zo_core, "__all__", [*zo_core.__all__, "Own"])
    trainer = ZOTrainer(make(), arguments(tmp_path, max_steps=1, zo_method="Own"), train_dataset=rows())
    trainer.train()
    assert type(trainer.zo_optimizer) is Own
    with pytest.raises(ValueError, match="learning_rate: expected a number"):
        ZOTrainer(make(), arguments(tmp_path, learning_rate=None, zo_method="Own")).create_optimizer()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_checkpointing": True}, "gradient_checkpointing: expected it to be off, got True"),
        ({"max_grad_norm": 1.0}, "max_grad_norm: expected it to be off"),
        ({"fp16": True}, "fp16: expected it to be off.*bf16"),
        ({"zo_method": "Adam"}, r"zo_method: expected one of \[.*'MeZO'.*\], got 'Adam'"),
        ({"zo_method": "ZOOptimizer"}, "zo_method: expected one of"),
        ({"zo_options": "[1]"}, "zo_options: expected a dict"),
        ({"zo_options": {"rhoo": 1}}, "zo_options: expected options of MeZO"),
        ({"zo_options": {"lr": 1}}, "zo_options: expected options of MeZO"),
        ({"zo_options": "{1"}, "zo_options: expected a dict"),
    ],
)
def test_what_makes_no_sense_is_refused_before_training(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_plain_arguments_other_optimizers_and_several_devices_are_refused(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="args: expected ZOTrainingArguments, got TrainingArguments"):
        ZOTrainer(make(), arguments(tmp_path, TrainingArguments))
    model = make()
    trainer = ZOTrainer(
        model,
        arguments(tmp_path),
        train_dataset=rows(),
        optimizers=(torch.optim.SGD(model.parameters(), lr=1e-3), None),
    )
    with pytest.raises(TypeError, match="optimizers: expected an optimizer of zo_core, got SGD"):
        trainer.train()
    opt = zo_core.MeZO(model, lr=1e-3)
    trainer = ZOTrainer(model, arguments(tmp_path), train_dataset=rows(), optimizers=(opt, None))
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 2)
    monkeypatch.setattr(Parallel, "grid", lambda self: (1, 2))
    for opt.processes in (None, Parallel(data=1)):
        with pytest.raises(ValueError, match="processes: expected zo_core.distributed.Parallel.*each of 2 processes"):
            trainer.create_optimizer()
    monkeypatch.setattr(ZOTrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="ZOTrainer: expected one device a process, got 2"):
        ZOTrainer(make(), arguments(tmp_path))


def train_in_order(folder, size, windows=2, **more):
    """Losses and weights of a run over the rows in order, whatever the number of processes."""
    if dist.is_initialized():
        place = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": dist.get_world_size()}
        os.environ.update(
            {name: str(number) for name, number in place.items()}, MASTER_ADDR="localhost", MASTER_PORT="0"
        )
    model = make()
    options = {"max_steps": 6, "lr_scheduler_type": "constant", "gradient_accumulation_steps": windows, **more}
    trainer = InOrder(model, arguments(folder, per_device_train_batch_size=size, **options), train_dataset=rows(32))
    trainer.train()
    exchanged = trainer.zo_optimizer.exchanged["step"]
    return [x["loss"] for x in trainer.state.log_history if "loss" in x], weights(model), exchanged


def test_two_processes_take_the_steps_of_one_with_twice_the_batch(tmp_path):
    losses, _, _ = train_in_order(tmp_path / "one", 4)
    found = ranks.run(train_in_order, 2, str(tmp_path / "two"), 2)
    for theirs, values, exchanged in found:
        assert theirs == pytest.approx(losses, abs=1e-4) and len(losses) == 6
        assert same(values, found[0][1]) and exchanged == 2 * 64


def test_two_processes_with_probes_of_their_own_take_the_steps_of_one_with_all(tmp_path):
    losses, values, _ = train_in_order(tmp_path / "one", 2, windows=4, spread_probes=True)
    found = ranks.run(train_in_order, 2, str(tmp_path / "two"), 2, windows=2, spread_probes=True)
    for theirs, others, exchanged in found:
        assert theirs == pytest.approx(losses, abs=1e-4) and len(losses) == 6 and exchanged == 2 * 64
        assert same(others, found[0][1]) and all(
            torch.allclose(p, q, atol=1e-4) for p, q in zip(others, values, strict=True)
        )


def test_an_optimizer_of_ones_own(tmp_path):
    model = make()
    opt = zo_core.MeZO([p for n, p in model.named_parameters() if "layers.1" in n], lr=1e-3, module=model)
    ZOTrainer(model, arguments(tmp_path, max_steps=2), train_dataset=rows(), optimizers=(opt, None)).train()
    moved = {n for (n, p), q in zip(model.named_parameters(), weights(make()), strict=True) if not torch.equal(p, q)}
    assert opt.updates == 2 and moved and all("layers.1" in n for n in moved)


def test_a_loss_of_16_bits_is_pointed_out(tmp_path):
    data = [{"input_ids": torch.arange(1, 13), "labels": torch.tensor(i % 2)} for i in range(8)]
    trainer = ZOTrainer(make(LlamaForSequenceClassification, dtype=torch.bfloat16), arguments(tmp_path, max_steps=1, eps=1e-2), train_dataset=data)  # fmt: skip
    with pytest.warns(UserWarning, match="loss in torch.bfloat16.*compute_loss_func"):
        trainer.train()


# ---- adapters ------------------------------------------------------------------------------

ADAPTERS = {
    "LORA": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "PREFIX_TUNING": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "PROMPT_TUNING": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_only_adapters_move_at_their_published_rates_and_resume_bit_for_bit(tmp_path, name):
    def trainer():
        args = arguments(tmp_path, learning_rate=None, max_steps=4, save_strategy="steps", save_steps=2)
        return ZOTrainer(get_peft_model(make(), ADAPTERS[name]), args, train_dataset=rows())

    whole, part = trainer(), trainer()
    before = {n: p.detach().clone() for n, p in whole.model.named_parameters()}
    whole.train()
    opt = whole.zo_optimizer
    assert (opt.defaults["lr"], opt.eps) == ((1e-4, 1e-2) if name == "LORA" else (1e-2, 1e-1))
    moved = {n for n, p in whole.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in whole.model.named_parameters() if p.requires_grad}
    part.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(weights(whole.model), weights(part.model))


def test_the_log_tells_how_many_differences_are_below_the_forwards_rounding(tmp_path):
    logged = {}
    for measured in (False, True):
        model = make()
        args = arguments(tmp_path, max_steps=3, probes=4, measure_floor=measured, gradient_accumulation_steps=2)
        trainer = InOrder(model, args, train_dataset=rows())
        trainer.train()
        logged[measured] = [x for x in trainer.state.log_history if "loss" in x], weights(model)
        assert [(x["flat"], x["skipped"]) for x in logged[measured][0]] == [(0, 0)] * 3
    assert [x["below_floor"] for x in logged[True][0]] == [0.0] * 3  # float32
    assert 0 < trainer.zo_optimizer.noise_floor < 1e-4 and trainer.zo_optimizer.below_floor == (0, 12)
    assert not any("below_floor" in x for x in logged[False][0]) and same(logged[True][1], logged[False][1])
