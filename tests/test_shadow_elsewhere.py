"""The shadow engine: compiled and scripted code, extensions, and whatever else reads parameters past torch's functions."""

import warnings

import pytest
import torch
from models import IDS, make
from shadows import at, bits, optimizer, unchanged
from torch import nn
from torch._dynamo.testing import CompileCounter

import zo_core


def test_tensors_read_elsewhere_are_named_once():
    model, loss = make("recurrent")
    opt = zo_core.MeZO(model, lr=1e-3)
    with pytest.warns(UserWarning, match=r"^head\.weight, head\.bias: read elsewhere"):
        opt.step(loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(loss)


def test_a_metric_that_swallows_not_a_number_is_still_compared():
    model, _ = make("recurrent")
    opt = optimizer(model)

    def metric():
        return float(model(IDS).argmax(-1).float().mean())  # of not-a-number, 0

    with pytest.warns(UserWarning, match=r"head\.weight"):
        opt.step(metric)


def test_a_closure_that_is_never_the_same_is_not_blamed():
    model, loss = make("llama")
    opt, values = optimizer(model), iter(range(1, 100))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(lambda: loss() * next(values))
    assert opt.memory()["held"] == 0


def test_an_error_of_the_closure_s_own_in_the_comparison_is_raised():
    model, loss = make("llama")
    opt, calls = optimizer(model), []

    def closure():
        calls.append(0)
        if len(calls) == 2:
            raise ValueError("mine")
        return loss()

    with pytest.raises(ValueError, match="mine"):
        opt.step(closure)


WAYS = ["torch.compile", "Module.compile", "forward", "regional", "regional, later", "closure"]


@pytest.mark.parametrize("way", WAYS)
def test_compiled_code_has_the_losses_of_uncompiled_code_and_is_compiled_once(way):
    (model, _), (twin, twin_loss), counter = make("llama"), make("llama"), CompileCounter()
    torch._dynamo.reset()
    used = torch.compile(model, backend=counter) if way == "torch.compile" else model
    if way == "Module.compile":
        model.compile(backend=counter)
    if way == "forward":
        model.forward = torch.compile(model.forward, backend=counter)
    if way == "regional":
        [layer.compile(backend=counter) for layer in model.model.layers]

    def loss():
        return used(input_ids=IDS, labels=IDS).loss.float()

    closure = torch.compile(loss, backend=counter) if way == "closure" else loss
    opts = [zo_core.FZOO(m, lr=1e-3, eps=1e-2, engine=e) for m, e in ((used, "shadow"), (twin, "inplace"))]
    if way == "regional, later":
        [layer.compile(backend=counter) for layer in model.model.layers]
    compiled = []
    for step in range(3):
        before = bits(model)
        if step == 1:  # a loss that is not finite leaves every bit
            assert opts[0].step(lambda: closure() * torch.nan).isnan() and unchanged(model, before)
            opts[1].step(lambda: twin_loss() * torch.nan)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*read elsewhere" if way == "closure" else "nothing else")
            seen = [float(opts[0].step(closure)), float(opts[1].step(twin_loss))]
        assert seen[0] == pytest.approx(seen[1], rel=1e-5)
        compiled.append(counter.frame_count)
    assert compiled[0] > 0 and compiled == [compiled[0]] * 3
    memory, whole = opts[0].memory(), sum(p.nbytes for p in model.parameters())
    assert (memory["held"] == whole) == (way == "closure")
    if way.startswith("regional"):  # two regions, and not the model
        region = sum(p.nbytes + 64 for p in model.model.layers[0].parameters())
        assert memory["scratch"] <= 2 * region < whole


def test_a_compiled_module_that_raises_leaves_every_bit_and_its_code():
    (model, loss), fail = make("llama"), []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0 if fail else None)
    model.model.layers[1].compile(backend="eager")
    opt, before, code = optimizer(model), bits(model), model.model.layers[1]._compiled_call_impl
    opt.step(loss)
    before = bits(model)
    fail.append(1)
    with pytest.raises(ZeroDivisionError):
        opt.step(loss)
    assert unchanged(model, before) and model.model.layers[1]._compiled_call_impl is code


class Keeps(nn.Module):
    """Keeps references to weights in the ways that a module can."""

    def __init__(self, how):
        super().__init__()
        self.a, self.bn = nn.Linear(16, 16), nn.BatchNorm1d(16)
        self.kept = {"dict": {"x": [self.a.weight]}, "view": self.a.weight.t(), "detached": self.a.weight.detach()}.get(
            how
        )
        if how == "frozen tie":
            self.b = nn.Linear(16, 16)
            self.b.weight = nn.Parameter(self.a.weight.data, requires_grad=False)
        if how == "closure":
            weight = self.a.weight
            self.read = lambda: weight
        self.how = how

    def forward(self, x):
        w = {"dict": lambda: self.kept["x"][0], "view": lambda: self.kept.t(), "detached": lambda: self.kept,
             "frozen tie": lambda: self.b.weight, "closure": lambda: self.read()}[self.how]()  # fmt: skip
        return self.bn(self.a(x) + nn.functional.linear(x, w))


@pytest.mark.parametrize("how", ["dict", "closure"])
def test_weights_that_are_kept_elsewhere_are_perturbed_there_too(how):
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        model, x = Keeps(how), torch.randn(8, 16)
    twin = Keeps(how)
    twin.load_state_dict(model.state_dict())
    opt, other, before, probe = optimizer(model), optimizer(twin, "inplace"), bits(model), torch.tensor([4])
    for c in (1e-2, -1e-2):
        expected = at(other, lambda: (twin(x) - 1).square().mean(), c, probe)
        assert torch.allclose(at(opt, lambda: (model(x) - 1).square().mean(), c, probe), expected, rtol=1e-5)
    assert unchanged(model, before) and opt.memory()["held"] == 0


@pytest.mark.parametrize("how", ["view", "detached", "frozen tie"])
def test_tensors_that_share_memory_with_a_parameter_are_refused_by_name(how):
    name = "b.weight" if how == "frozen tie" else "kept"
    with pytest.raises(
        ValueError, match=rf"module: {name} shares its memory with a\.weight, which is trained.*inplace"
    ):
        optimizer(Keeps(how))
    assert optimizer(Keeps(how), "inplace").step(lambda: 1.0) == 1.0


def test_parts_of_one_memory_that_do_not_overlap_are_served():
    model, flat = nn.Linear(4, 4), torch.randn(32)
    model.weight = nn.Parameter(flat[:16].view(4, 4))
    model.other = nn.Parameter(flat[16:], requires_grad=False)
    optimizer(model).step(lambda: model(torch.ones(2, 4)).sum() + model.other.sum())


def test_a_flat_metric_is_compared_again_when_it_moves():
    model, _ = make("recurrent")
    opt = optimizer(model)
    for _ in range(2):
        opt.step(lambda: 0.0)
    with pytest.warns(UserWarning, match=r"head\.weight"):
        opt.step(lambda: model(IDS).square().mean())


def test_a_held_weight_that_a_closure_replaces_is_put_back():
    class Scaled(nn.Parameter):
        pass

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model[0].weight = Scaled(model[0].weight.detach().clone())
    before, opt = bits(model), optimizer(model, lr=0.0)

    def closure():
        model[0].weight.data = model[0].weight.data.clone()
        return model(torch.ones(2, 4)).sum()

    opt.step(closure)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_scripted_submodule_is_perturbed_in_place():
    model, twin = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        model[1] = torch.jit.script(model[1])
    opts = optimizer(model), optimizer(twin, "inplace")
    for _ in range(3):
        seen = [o.step(lambda m=m: m(torch.ones(2, 4)).sum()) for o, m in zip(opts, (model, twin), strict=True)]
        assert torch.allclose(seen[0], seen[1], rtol=1e-5, atol=1e-6)


def test_parameters_keep_their_attributes_and_subclasses_are_held():
    class Scaled(nn.Parameter):
        pass

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.scale = 3.0
    model[1].weight = Scaled(model[1].weight.detach().clone())
    opt, seen = optimizer(model), []
    for _ in range(3):
        opt.step(
            lambda: (model(torch.ones(2, 4)).sum(), seen.append((model[0].weight.scale, type(model[1].weight))))[0]
        )
    assert set(seen) == {(3.0, Scaled)}
