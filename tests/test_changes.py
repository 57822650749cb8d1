"""What changes around a step is followed or refused by name: tensors, buffers, casts; and steps that change nothing are told."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize
from toys import X, Y, loss_of, same

import zo_core
from zo_core import Journal, JournalError
from zo_core.closure import Buffers
from zo_core.optim.state import of_entries

ENGINES = pytest.mark.parametrize("engine", ["shadow", "inplace"])


def network(dtype=torch.float32, *middle: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 16), *(middle or (nn.Tanh(),)), nn.Linear(16, 1)).to(dtype)


# ---- nothing that is trained is used -----------------------------------------------------------------------------


@ENGINES
def test_parameters_that_were_replaced_are_named_at_the_next_step(engine):
    model = network()
    opt = zo_core.MeZO(model, lr=1e-2, engine=engine)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    with pytest.warns(
        UserWarning, match=r"0\.weight, 0\.bias, 2\.weight, 2\.bias: replaced by another parameter\. .*assign"
    ):
        opt.step(loss_of(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(loss_of(model))  # once


def test_parameters_that_a_module_no_longer_has_are_named():
    model = network()
    opt = zo_core.MeZO(model, lr=1e-2)
    opt.step(loss_of(model))
    model[2] = nn.Identity()
    with pytest.warns(UserWarning, match=r"2\.weight, 2\.bias: no longer a parameter of the module\."):
        opt.step(loss_of(model))


def test_parameters_without_memory_are_refused_when_an_optimizer_is_made_and_at_the_step_where_it_begins():
    model = network()
    with pytest.raises(ValueError, match=r"params: 0\.weight, 0\.bias, 2\.weight and 1 more on the meta device"):
        zo_core.MeZO(network().to("meta"), lr=1e-2)
    opt = zo_core.MeZO(model, lr=1e-2)
    opt.step(loss_of(model))
    model[0].weight = nn.Parameter(model[0].weight.to("meta"))  # as accelerate's offloading does
    with pytest.raises(RuntimeError, match=r"0\.weight: on the meta device now"):
        opt.step(loss_of(model))


@ENGINES
def test_steps_whose_losses_are_all_the_same_are_counted_and_told_once(engine):
    model = network()
    opt = zo_core.MeZO(model, lr=1e-2, engine=engine)
    opt.step(loss_of(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(9):
            opt.step(lambda: 1.0)
        opt.step(loss_of(model))
        for _ in range(9):
            opt.step(lambda: 1.0)
    with pytest.warns(UserWarning, match="losses of the last 10 steps were the same at all probes"):
        opt.step(lambda: 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            opt.step(lambda: 1.0)
    assert opt.flat == 39


# ---- tensors that change -----------------------------------------------------------------------------------------


@ENGINES
@pytest.mark.parametrize("method", [zo_core.MeZO, zo_core.HiZOO, zo_core.FZOO])
def test_a_tensor_that_is_frozen_later_stays_as_it_is_and_the_journal_knows(tmp_path, method, engine):
    model, base = network(), network()
    opt = method(model, lr=1e-2, weight_decay=0.1, engine=engine)
    opt.journal = Journal.create(tmp_path / "run.zoj", opt)
    opt.step(loss_of(model))
    model[0].weight.requires_grad_(False)
    frozen, other = model[0].weight.clone(), model[2].weight.clone()
    for _ in range(3):
        opt.step(loss_of(model))
    assert torch.equal(model[0].weight, frozen) and not torch.equal(model[2].weight, other)
    model[0].weight.requires_grad_(True)
    opt.step(loss_of(model))
    assert not torch.equal(model[0].weight, frozen)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="replay agrees with the run to rounding")
        zo_core.replay(base, tmp_path / "run.zoj")
    assert same(model, base) or engine == "inplace"


def test_a_step_with_nothing_left_to_train_is_refused():
    model = network()
    opt = zo_core.MeZO(model, lr=1e-2)
    model.requires_grad_(False)  # another adapter is trained now, say
    with pytest.raises(RuntimeError, match=r"params: 0\.weight, 0\.bias, 2\.weight and 1 more are all frozen now"):
        opt.step(loss_of(model))
    assert same(model, network())


@ENGINES
def test_a_tensor_exchanged_in_a_group_is_trained_from_then_on(engine):
    model = network(torch.bfloat16)
    opt = zo_core.MeZO(model, lr=1e-2, eps=1e-1, engine=engine)
    opt.step(loss_of(model))
    old, new = model[0].weight, nn.Parameter(model[0].weight.detach().clone())
    model[0].weight = opt.param_groups[0]["params"][0] = new
    before = [old.clone(), new.clone()]
    with pytest.warns(UserWarning, match=r"0\.weight: written since the last step"):
        opt.step(loss_of(model))
    assert torch.equal(old, before[0]) and not torch.equal(new, before[1])


def test_a_group_that_was_removed_is_refused():
    model = network()
    opt = zo_core.MeZO([{"params": list(m.parameters())} for m in (model[0], model[2])], lr=1e-2, module=model)
    del opt.param_groups[0]
    with pytest.raises(RuntimeError, match="param_groups: expected the 4 tensors that the optimizer has, got 2"):
        opt.step(loss_of(model))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (zo_core.MeZO, {}),
        (zo_core.HiZOO, {}),
        (zo_core.HiZOO, {"hessian": "factored"}),
        (zo_core.MeZO, {"engine": "inplace"}),
    ],
)
@pytest.mark.parametrize("rows", [12, 7])
def test_a_tensor_of_another_shape_goes_on_with_state_of_that_shape(method, options, rows):
    model, ids = nn.Embedding(10, 4, dtype=torch.bfloat16), torch.tensor([1, 2])
    opt = method(model, lr=1e-2, eps=1e-1, **options)

    def loss():
        return model(ids).float().square().mean()

    opt.step(loss)
    model.weight.data = torch.ones(rows, 4, dtype=torch.bfloat16)  # as resize_token_embeddings does
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(written since|another shape)")
        opt.step(loss)
    opt.step(loss)
    assert opt._own["residuals"][0].shape == (rows, 4) and not torch.equal(model.weight, torch.ones_like(model.weight))


# ---- closures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_an_evaluation_after_a_step_under_autocast_reads_the_weights_as_they_are(fails):
    model, calls = network(), []
    opt = zo_core.MeZO(model, lr=1e-2, eps=0.5, engine="inplace")

    def loss():
        calls.append(0)
        value = (model(X) - Y).float().square().mean()
        if fails and len(calls) == 2:
            raise KeyError
        return value

    with torch.autocast("cpu", torch.bfloat16):
        if fails:
            with pytest.raises(KeyError):
                opt.step(loss)
        else:
            opt.step(loss)
        after = model(X)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(after, model(X))


@ENGINES
def test_a_closure_that_writes_a_weight_is_refused_by_name(engine):
    model = network()
    opt = zo_core.MeZO(model, lr=1e-2, engine=engine)
    for bias in (lambda: model[2].bias, lambda: model[2].bias.data)[: 1 if engine == "inplace" else 2]:
        with pytest.raises(RuntimeError, match=r"closure: .*2\.bias"):
            opt.step(lambda bias=bias: (bias().add_(1.0), loss_of(model)())[1])
    assert opt.updates == 0


@ENGINES
def test_buffers_are_the_same_in_all_evaluations_and_then_as_one_left_them(engine):
    model, seen = network(torch.float32, nn.BatchNorm1d(16), nn.Tanh()), []
    norm = model[1]
    opt = zo_core.MeZO(model, lr=0.0, probes=3, engine=engine)
    before = copy.deepcopy(norm.state_dict())
    for steps in range(1, 4):
        seen.clear()
        opt.step(lambda: (seen.append(norm.running_mean.clone()), loss_of(model)())[1])
        assert all(torch.equal(x, seen[0]) for x in seen) and norm.num_batches_tracked == steps
        assert not torch.equal(norm.running_mean, seen[0])
    norm.eval()
    opt.step(loss_of(model))
    norm.train()
    kept = copy.deepcopy(norm.state_dict())

    def broken():
        loss_of(model)()
        raise KeyError

    with pytest.raises(KeyError):
        opt.step(broken)
    opt.step(lambda: loss_of(model)() * torch.nan)
    assert opt.skipped == 1
    for name, value in norm.state_dict().items():
        assert "weight" in name or "bias" in name or torch.equal(value, kept[name]), name
    assert not torch.equal(kept["running_mean"], before["running_mean"])


@ENGINES
@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_the_vectors_of_a_spectral_norm_advance_once_a_step(norm, engine):
    model, seen = network(), []
    norm(model[0])
    opt, buffers = zo_core.MeZO(model, lr=1e-2, probes=2, engine=engine), list(model.buffers())
    before = [b.clone() for b in buffers]
    opt.step(lambda: (seen.append([b.clone() for b in buffers]), loss_of(model)())[1])
    assert all(all(map(torch.equal, x, before)) for x in seen) and opt.flat == 0
    assert not any(map(torch.equal, buffers, before))


def test_buffers_are_put_back_when_the_first_evaluation_of_all_fails():
    model = network(torch.float32, nn.BatchNorm1d(16), nn.Tanh())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError):
        zo_core.MeZO(model, lr=1e-2).step(lambda: (loss_of(model)(), {}["no"]))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_buffers_are_watched_after_a_first_step_that_failed_before_any_of_them_was_written():
    model, seen = network(torch.float32, nn.BatchNorm1d(16), nn.Tanh()), []
    opt = zo_core.MeZO(model, lr=1e-2, engine="shadow")
    with pytest.raises(KeyError):
        opt.step(lambda: {}["no"])
    opt.step(lambda: (seen.append(model[1].running_mean.clone()), loss_of(model)())[1])
    assert len(seen) > 1 and all(torch.equal(x, seen[0]) for x in seen)


def test_buffers_that_a_forward_replaces_are_put_back_too():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1
            return self.inner(x) * (1 + 0.1 * self.calls)

    model = Counts()
    opt = zo_core.MeZO(model, lr=1e-2)
    for step in range(1, 4):
        opt.step(loss_of(model))
        assert model.calls == step
    with pytest.raises(KeyError):
        opt.step(lambda: (loss_of(model)(), {}["no"]))
    assert model.calls == 3


def test_buffers_that_no_forward_writes_are_not_copied_after_the_first_step():
    model = network(torch.float32, nn.BatchNorm1d(16).eval(), nn.Tanh())
    opt, kept = zo_core.MeZO(model, lr=1e-2), []
    begin = Buffers.begin
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Buffers, "begin", lambda self: (begin(self), kept.append(len(self.saved))))
        for _ in range(3):
            opt.step(loss_of(model))
    assert kept == [3, 0, 0]


@ENGINES
def test_cached_parametrizations_see_each_probe(engine):
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    losses = []
    for cached in (False, True):
        model = network()
        parametrize.register_parametrization(model[0], "weight", Doubled())
        opt = zo_core.FZOO(model, lr=1e-2, engine=engine)
        if cached:
            with parametrize.cached():
                losses.append([float(opt.step(loss_of(model))) for _ in range(3)])
        else:
            losses.append([float(opt.step(loss_of(model))) for _ in range(3)])
    assert losses[0] == losses[1]


class Wrapped(torch.Tensor):
    """A tensor without memory of its own, as torchao's and quanto's quantised weights are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        return func(*(x.inner if isinstance(x, cls) else x for x in args), **(kwargs or {}))


class Sparse(nn.Module):
    """A layer with a frozen sparse weight, one that is nested, and buffers that torch hardly computes with."""

    def __init__(self, linear):
        super().__init__()
        self.bias, self.inner = linear.bias, nn.Parameter(linear.weight.detach().to_sparse_csr(), requires_grad=False)
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        self.nested = nn.Parameter(nested, requires_grad=False)
        self.register_buffer("edges", self.inner.detach())
        self.register_buffer("packed", torch.ones(3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2))

    def forward(self, x):
        return (self.inner @ x.T).T + self.bias


@pytest.mark.parametrize("engine", ["shadow", "inplace", "grouped"])
def test_what_is_trained_beside_sparse_and_nested_tensors_trains_as_beside_plain_ones(engine):
    models = [network(), network()]
    models[1][0] = Sparse(models[1][0])
    models[0][0].weight.requires_grad_(False)
    for model in models:
        opt = zo_core.FZOO(model, lr=1e-2, engine=engine)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*grouped")
            for _ in range(3):
                opt.step(lambda model=model: (model(X) - Y).square().mean())
    assert torch.allclose(models[0][2].weight, models[1][2].weight, atol=1e-5)


@ENGINES
@pytest.mark.parametrize("method", [zo_core.MeZO, zo_core.HiZOO])
def test_what_is_trained_beside_a_frozen_quantised_weight_trains_as_beside_a_plain_one(method, engine):
    models = [network(), network()]
    for model, kind in zip(models, (lambda x: x, Wrapped), strict=True):
        model[0].weight = nn.Parameter(kind(model[0].weight.detach().clone()), requires_grad=False)
        opt = method(model, lr=1e-2, engine=engine, module=model)
        for _ in range(3):
            opt.step(lambda model=model: (model(X) - Y).square().mean())
        again = method(model, lr=1e-2, engine=engine)
        again.load_state_dict(opt.state_dict())
    assert torch.equal(models[0][2].weight, models[1][2].weight)
    assert torch.equal(models[0][0].weight, models[1][0].weight.inner)


@ENGINES
def test_a_closure_that_freezes_and_unfreezes_leaves_parameters_as_it_says(engine):
    model = network()
    opt = zo_core.MeZO(model, lr=1e-2, engine=engine)

    def loss():
        model.requires_grad_(False)
        value = loss_of(model)()
        model.requires_grad_(True)
        return value

    opt.step(loss)
    opt.step(loss)
    assert all(p.requires_grad for p in model.parameters()) and opt.updates == 2


# ---- options and state -------------------------------------------------------------------------------------------


def test_params_and_seeds_that_are_misread_easily_are_refused_by_name(tmp_path):
    model = network()
    for wrong in (dict(model.named_parameters()), "weights", None):
        with pytest.raises(TypeError, match="params: expected a module.*got a (dict|str|NoneType)"):
            zo_core.MeZO(wrong, lr=1e-2)
    for wrong in ([1], [model[0]], [("a", 1)], b"weights"):
        with pytest.raises(TypeError, match="params: expected tensors or .name, tensor. pairs, got"):
            zo_core.MeZO(wrong, lr=1e-2)
    for seed in (None, 1.5, "1"):
        with pytest.raises(TypeError, match="seed: expected an integer"):
            zo_core.MeZO(model, lr=1e-2, seed=seed)
    opt = zo_core.MeZO(model, lr=1e-2, seed=np.int64(7))
    opt.journal = Journal.create(tmp_path / "run.zoj", opt)
    opt.step(loss_of(model))
    assert opt.journal.header.seed == 7


def test_a_state_of_other_dtypes_is_refused_as_such():
    state = zo_core.MeZO(network(torch.bfloat16), lr=1e-2, eps=0.1).state_dict()
    with pytest.raises(ValueError, match="state_dict: it is of weights of another dtype"):
        zo_core.MeZO(network(), lr=1e-2).load_state_dict(state)


def test_a_closed_journal_says_so(tmp_path):
    model = network()
    opt = zo_core.MeZO(model, lr=1e-2)
    opt.journal = Journal.create(tmp_path / "run.zoj", opt)
    opt.journal.close()
    with pytest.raises(JournalError, match=r"run\.zoj: is closed; Journal\.resume"):
        opt.step(loss_of(model))


def test_tensors_of_a_later_group_get_their_names_from_the_module():
    model, extra = network(), nn.Parameter(torch.zeros(3))
    model[0].requires_grad_(False)
    opt = zo_core.MeZO(model, lr=1e-2)
    model[0].requires_grad_(True)
    opt.add_param_group({"params": model[0].parameters()})
    opt.add_param_group({"params": extra})
    assert opt._names() == ["2.weight", "2.bias", "0.weight", "0.bias", "group 2 tensor 0"]
    opt.step(loss_of(model))


STATEFUL = pytest.mark.parametrize(
    ("method", "dtype", "options"),
    [
        (zo_core.MeZO, torch.bfloat16, {"eps": 0.1}),
        (zo_core.FZOO, torch.float32, {"reuse": True, "probes": 4}),
        (zo_core.HiZOO, torch.float32, {}),
        (zo_core.HiZOO, torch.bfloat16, {"hessian": "factored", "eps": 0.1}),
        (zo_core.FZOO, torch.float32, {"engine": "grouped", "distribution": "factored", "probes": 4}),
    ],
)


@STATEFUL
@pytest.mark.parametrize("full", [False, True])
def test_torch_s_distributed_checkpoint_saves_an_optimizer_that_goes_on_bit_for_bit(
    tmp_path, method, dtype, options, full
):
    def run(model):
        return method(model, lr=1e-2, seed=3, **options)

    kinds = dcp.state_dict.StateDictOptions(full_state_dict=full, cpu_offload=full)
    model, loaded = network(dtype), network(dtype)
    opt, other = run(model), run(loaded)
    for _ in range(3):
        opt.step(loss_of(model))
    saved = dcp.state_dict.get_state_dict(model, opt, options=kinds)
    dcp.save(dict(zip(("model", "opt"), saved, strict=True)), checkpoint_id=tmp_path)
    found = dict(zip(("model", "opt"), dcp.state_dict.get_state_dict(loaded, other, options=kinds), strict=True))
    dcp.load(found, checkpoint_id=tmp_path)
    dcp.state_dict.set_state_dict(
        loaded, other, model_state_dict=found["model"], optim_state_dict=found["opt"], options=kinds
    )
    for _ in range(2):
        states = [o.state_dict() for o in (opt, other)]
        kept = [sorted((k, str(x)) for k, x in of_entries(state).items()) for state in states]
        assert kept[0] == kept[1] and states[0]["param_groups"] == states[1]["param_groups"] and same(model, loaded)
        for _ in range(3):
            assert opt.step(loss_of(model)) == other.step(loss_of(loaded))


@ENGINES
def test_an_optimizer_is_not_saved_loaded_copied_or_changed_inside_its_closure(engine):
    model = network()
    opt = zo_core.MeZO(model, lr=1e-2, engine=engine)
    state, group = opt.state_dict(), {"params": [nn.Parameter(torch.ones(2))]}
    for what, call in (
        ("state_dict", opt.state_dict),
        ("load_state_dict", lambda: opt.load_state_dict(state)),
        ("add_param_group", lambda: opt.add_param_group(group)),
        ("deepcopy, pickle", lambda: copy.deepcopy(opt)),
    ):
        with pytest.raises(RuntimeError, match=f"^{what}: called from inside the closure"):
            opt.step(lambda call=call: (call(), loss_of(model)())[1])
    opt.step(loss_of(model))
    assert opt.updates == 1 and len(opt.param_groups) == 1


def test_a_state_that_is_no_zeroth_order_optimizer_s_is_refused_by_what_it_has():
    model = network()
    adam = torch.optim.Adam(model.parameters())
    with pytest.raises(
        ValueError, match="state_dict: expected an entry 'zo' in the state of the first parameter.*no param"
    ):
        zo_core.MeZO(model, lr=1e-2).load_state_dict(adam.state_dict())
    opt = zo_core.MeZO(model, lr=1e-2)
    assert "zo" not in opt.state and opt.state["zo"]["seed"] == opt.seed  # as earlier versions had it
    state = opt.state_dict()
    del state["state"][0]["zo"]["stream"]
    with pytest.raises(ValueError, match="state_dict: expected a state with .*'stream'"):
        opt.load_state_dict(state)


def test_hooks_of_states_see_and_change_whole_ones():
    model, seen = network(), []
    opt, other = zo_core.MeZO(model, lr=1e-2), zo_core.MeZO(network(), lr=1e-2)
    opt.step(loss_of(model))
    saved, fresh = opt.state_dict(), other.state_dict()
    other.register_load_state_dict_pre_hook(lambda _, given: saved if given["state"] else None)
    other.register_load_state_dict_post_hook(lambda o: seen.append(o.updates))
    other.register_state_dict_post_hook(lambda _, found: {"hash": found["state"][0]["hash"]})
    with torch.device("meta"):  # torch's default is not what decides
        other.load_state_dict(fresh)
    assert seen == [1] and other.state_dict() == {"hash": None}


@STATEFUL
def test_copies_and_pickles_of_an_optimizer_and_its_model_go_on_bit_for_bit(method, dtype, options):
    model = network(dtype)
    opt = method(model, lr=1e-2, seed=3, **options)
    opt.step(loss_of(model))
    pairs = [copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))]
    opt.step(loss_of(model))
    for other, copied in pairs:
        copied.step(loss_of(other))
        assert same(model, other) and str(opt.state_dict()) == str(copied.state_dict())


def test_warnings_point_at_the_line_that_calls_the_library(tmp_path):
    def line_of(text, call):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            call()
        (shown,) = [w for w in found if text in str(w.message)]
        return shown.filename, shown.lineno - call.__code__.co_firstlineno

    model = network(torch.bfloat16)
    opt = zo_core.MeZO(model, lr=1e-2, eps=0.1)
    opt.step(loss_of(model))
    torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0)  # which wraps step as torch itself does
    with torch.no_grad():
        model[0].weight.add_(1)
    assert line_of("written since", lambda: opt.step(loss_of(model))) == (__file__, 0)
    assert line_of("less than the spacing", lambda: zo_core.HiZOO(model, lr=1e-2, eps=1e-6)) == (__file__, 0)

    def ten_steps():
        for _ in range(10):
            opt.step(lambda: 1.0)

    assert line_of("losses of the last 10 steps", ten_steps) == (__file__, 2)
    model[2] = nn.Linear(16, 1)
    assert line_of("replaced by another parameter", lambda: opt.step(loss_of(model.float()))) == (__file__, 0)


# ---- layouts, padding --------------------------------------------------------------------------------------------


class Weights(nn.Module):
    """Weights in an order of their own in memory, and a loss that reads them in their logical order."""

    def __init__(self, permuted: bool, dtype: torch.dtype) -> None:
        super().__init__()
        image = (torch.arange(5 * 3 * 4 * 6) % 37 / 37).view(5, 3, 4, 6).to(dtype)
        matrix = (torch.arange(33 * 70) % 41 / 41).view(33, 70).to(dtype)
        self.image = nn.Parameter(image.to(memory_format=torch.channels_last) if permuted else image)
        self.matrix = nn.Parameter(matrix.T.contiguous().T if permuted else matrix)
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=dtype))

    def forward(self) -> torch.Tensor:
        x, y = self.image.float().contiguous(), self.matrix.float().contiguous()
        return (
            self.scale * (x.square().mean() - y[:, :3].square().mean()).tanh()
            + functional.embedding(torch.tensor([1, 2]), self.matrix).float().contiguous().square().mean()
        )


@pytest.mark.parametrize("engine", ["shadow", "inplace", "grouped"])
@pytest.mark.parametrize(
    ("method", "dtype", "options"),
    [
        (zo_core.MeZO, torch.bfloat16, {"weight_decay": 0.1, "eps": 0.1}),
        (zo_core.FZOO, torch.float32, {}),
        (zo_core.HiZOO, torch.float32, {"smoothing": 0.1}),
        (zo_core.HiZOO, torch.float16, {"hessian": "factored", "smoothing": 0.1, "eps": 0.1}),
    ],
)
def test_weights_in_any_dense_order_in_memory_train_as_contiguous_ones(tmp_path, engine, method, dtype, options):
    models = [Weights(permuted, dtype) for permuted in (False, True)]
    start = copy.deepcopy(models[1])
    opts = [method(model, lr=1e-2, engine=engine, **options) for model in models]
    opts[1].journal = Journal.create(tmp_path / "run.zoj", opts[1])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(grouped|rounding)")
        for _ in range(3):
            losses = [opt.step(model) for opt, model in zip(opts, models, strict=True)]
            assert losses[0] == losses[1]
        zo_core.replay(start, tmp_path / "run.zoj")
    assert same(*models) and not models[1].image.is_contiguous() and not models[1].matrix.is_contiguous()
    assert str(opts[0]._own["residuals"]) == str(opts[1]._own["residuals"])
    assert same(models[0], start) or engine == "inplace"


def test_weights_with_gaps_in_memory_are_refused():
    gaps = nn.Parameter(torch.ones(4, 6)[:, :3])
    with pytest.raises(ValueError, match=r"gaps: expected a contiguous tensor"):
        zo_core.MeZO([("gaps", gaps)], lr=1e-2)
    with pytest.raises(TypeError, match="wide: expected torch.float32 or .*float64"):
        zo_core.MeZO([("wide", nn.Parameter(torch.ones(2, dtype=torch.float64)))], lr=1e-2)


class Padded(nn.Module):
    """An embedding with a padding row that the forward reads, and a head."""

    def __init__(self, dtype: torch.dtype, tied: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.random.default_generator.manual_seed(0)
            self.embed, self.head = nn.Embedding(40, 8, padding_idx=3), nn.Linear(8, 40)
        if tied:
            self.head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.log_softmax(self.head(self.embed(x).float().to(self.head.weight.dtype)).float(), -1)


WORDS = torch.tensor([[1, 2, 3], [4, 3, 3]])


@pytest.mark.parametrize("words", [WORDS, torch.arange(80).view(4, 20) % 40], ids=["rows", "whole"])
@pytest.mark.parametrize("engine", ["shadow", "inplace", "grouped"])
@pytest.mark.parametrize(
    ("method", "dtype", "options"),
    [
        (zo_core.MeZO, torch.bfloat16, {"weight_decay": 0.1, "eps": 0.1}),
        (zo_core.FZOO, torch.float32, {"distribution": "factored"}),
        (zo_core.HiZOO, torch.float32, {"smoothing": 0.1}),
        (zo_core.HiZOO, torch.float32, {"hessian": "factored", "smoothing": 0.1}),
    ],
)
def test_the_padding_row_of_an_embedding_is_in_no_probe_and_no_update(tmp_path, words, engine, method, dtype, options):
    model, base, where = Padded(dtype), Padded(dtype), (words == 3).flatten().nonzero().flatten()
    with torch.no_grad():
        for m in (model, base):
            m.embed.weight[3] = 0.5  # which decay would move
    opt = method(model, lr=1e-2, engine=engine, **options)
    opt.journal = Journal.create(tmp_path / "run.zoj", opt)

    def loss():
        row = model.embed(words).view(-1, 8)[where]
        return model(words).square().mean() + 1e9 * (row - 0.5).float().square().sum()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(grouped|rounding)")
        losses = [float(opt.step(loss)) for _ in range(3)]
        zo_core.replay(base, tmp_path / "run.zoj")
    assert engine != "grouped" or opt._engine.fallback is None
    assert max(losses) < 100 and bool((model.embed.weight[3] == 0.5).all())
    assert not torch.equal(model.embed.weight[2], Padded(dtype).embed.weight[2])
    assert Journal.open(tmp_path / "run.zoj").header.padding == ((0, 3),)
    assert same(model, base) or engine == "inplace"


@pytest.mark.parametrize("form", ["of today", "of earlier versions", "no state"])
def test_a_run_that_trained_padding_rows_as_earlier_versions_did_goes_on_so(tmp_path, form):
    def run(model):
        opt = zo_core.MeZO(model, lr=1e-2, weight_decay=0.1)
        return opt, lambda: model(WORDS).square().mean()

    path, old, base, model = tmp_path / "run.zoj", *(Padded(torch.float32) for _ in range(3))
    old.embed.padding_idx = None  # so that its journal and its state name no such row
    opt, loss = run(old)
    opt.journal = Journal.create(path, opt)
    for _ in range(3):
        opt.step(loss)
    opt.journal.close()
    opt.journal = None
    row, (other, again) = old.embed.weight[3].clone(), run(model)
    state = opt.state_dict()
    if form == "no state":
        other.journal = Journal.recover(path, other)
    else:
        model.load_state_dict(old.state_dict())
        earlier = {**state, "state": {"zo": of_entries(state)}}
        other.load_state_dict(earlier if form == "of earlier versions" else state)
        other.journal = Journal.resume(path, other)
    assert opt.step(loss) == other.step(again) and same(old, model)
    zo_core.replay(base, path)
    assert same(old, base) and not torch.equal(old.embed.weight[3], row)
    with pytest.raises(JournalError, match="seed"):
        Journal.recover(path, fresh := zo_core.MeZO(Padded(torch.float32), lr=1e-2, seed=1), writable=False)
    assert fresh._space().padding == {0: 3}


def test_a_factored_hessian_learns_nothing_of_a_padding_row():
    model = Padded(torch.float32)
    opt = zo_core.HiZOO(model, lr=1e-2, hessian="factored", smoothing=0.25)
    opt.step(lambda: model(WORDS).square().mean())
    rows = opt._own["hessians"][0][0]
    assert rows[3] == 0.75 and rows[2] != 0.75


def test_a_padding_row_that_a_head_reads_too_is_trained_as_by_gradients():
    model = Padded(torch.float32, tied=True)
    model(WORDS).square().mean().backward()
    assert model.embed.weight.grad[3].any()
    before = model.embed.weight[3].clone()
    opt = zo_core.MeZO(model, lr=1e-2)
    opt.step(lambda: model(WORDS).square().mean())
    assert not torch.equal(model.embed.weight[3], before) and opt._space().padding == {}
