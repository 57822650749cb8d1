"""Sharded weights take the steps of whole ones: each shard gets its part of the noise, whatever the way it is cut."""

import copy
import warnings

import pytest
import ranks
import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import zo_core
from zo_core.distributed import Parallel, RankError
from zo_core.sharding import Pieces, Runs, local, runs_of

X = torch.linspace(-1, 1, 40 * 6).view(40, 6).sin()
Y = X[:, :1] * X[:, 1:2] + X[:, 2:3]


class Blocks(nn.Module):
    """Three residual blocks between two layers; no size but 16 can be cut into equal parts."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 7), nn.Tanh(), nn.Linear(7, 16)) for _ in range(3)
        )
        self.last = nn.Linear(16, 1)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


def network(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        return Blocks().to(dtype)


def fsdp(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def shard(model, mesh, placements):
    """Replace the parameters by DTensors, replicated where they have no such dimension."""
    for module in list(model.modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            places = [Replicate() if isinstance(x, Shard) and x.dim >= p.dim() else x for x in placements]
            setattr(module, name, nn.Parameter(distribute_tensor(p.data, mesh, places)))
    return model


def cut(model, kind):
    """A model with its weights sharded in one of these ways, or left whole."""
    if kind == "fsdp":
        fsdp(model)
        model.load_state_dict({name: p.clone() for name, p in model.state_dict().items()}, assign=True)
        return model
    if kind == "columns":  # 16, 7 and 6 of them over 3 ranks
        return shard(model, init_device_mesh("cpu", (3,)), [Shard(1)])
    if kind == "rows and columns":
        return shard(model, init_device_mesh("cpu", (2, 2)), [Shard(0), Shard(1)])
    if kind == "fsdp over rows":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        return fully_shard(shard(model, mesh["tensor"], [Shard(0)]), mesh=mesh["data"])
    return model


def gathered(model):
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().float().clone() for p in model.parameters()]


METHODS = {"mezo": zo_core.MeZO, "lezo": zo_core.LeZO, "hizoo": zo_core.HiZOO, "fzoo": zo_core.FZOO,
           "adamezo": zo_core.AdaMeZO}  # fmt: skip
RUNS = {
    "mezo": {"lr": 2e-2, "probes": 2},
    "lezo": {"method": "lezo", "lr": 2e-2, "rho": 0.5, "calibrate": 30},
    "bfloat16, residuals of 8 bits": {"lr": 2e-2, "dtype": torch.bfloat16},
    "float16, no residuals": {"method": "fzoo", "lr": 1e-2, "dtype": torch.float16, "residual": None, "probes": 3},
    "hizoo": {"method": "hizoo", "lr": 2e-2, "smoothing": 1e-2},
    "adamezo": {"method": "adamezo", "lr": 3e-3, "window": 4},
    "hizoo, scales": {
        "method": "hizoo",
        "lr": 2e-2,
        "smoothing": 1e-2,
        "scales": {"*.1.weight": 2.0, "last.bias": 0.5},
    },
}


def train(kind, steps, method="mezo", dtype=torch.float32, calibrate=0, **options):
    """Losses and gathered weights; with scales that are measured first, where ``calibrate`` is a number of evaluations."""
    model = cut(network(dtype), kind)
    parallel = Parallel(check_every=3) if kind else None
    calculates = model if kind in ("", "fsdp") else network(dtype)

    def loss():
        full = {name: p.full_tensor() for name, p in model.named_parameters()} if calculates is not model else {}
        return (torch.func.functional_call(calculates, full, X.to(dtype)).float() - Y).square().mean()

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that residuals start from 0, say
        warnings.filterwarnings("ignore", "eps=")
        opt = METHODS[method](
            model, engine=None if kind else "inplace", seed=7, processes=parallel, weight_decay=0.1, **options
        )
        losses = sorted(zo_core.calibrate(opt, loss, calibrate).values()) if calibrate else []
        for _ in range(steps):
            losses.append(float(opt.step(loss)))
            with torch.no_grad():
                loss()  # FSDP2 keeps the weights of its root gathered
    assert opt.engine == "inplace" and opt.updates == steps
    return losses, gathered(model)


def train_all(kind, steps, names=tuple(RUNS)):
    return {name: train(kind, steps, **RUNS[name]) for name in names}


@pytest.mark.parametrize(
    ("kind", "count", "steps", "names"),
    [
        ("fsdp", 3, 20, tuple(RUNS)),
        ("columns", 3, 4, ("lezo", "bfloat16, residuals of 8 bits", "hizoo, scales")),
        ("rows and columns", 4, 3, ("float16, no residuals",)),
        ("fsdp over rows", 4, 3, ("bfloat16, residuals of 8 bits",)),
    ],
)
def test_shards_are_one_process_bit_for_bit(kind, count, steps, names):
    alone = train_all("", steps, names)
    for found in ranks.run(train_all, count, kind, steps, names):
        for name, (losses, values) in found.items():
            assert losses == alone[name][0], name
            assert all(map(torch.equal, values, alone[name][1])), name


def whereabouts():
    """Whether runs say where elements are: of tensors of many shapes, cut in many ways."""
    cuts = {(4,): [[Shard(0)], [Shard(1)], [Shard(2)], [Replicate()]]}
    cuts[2, 2] = [[Shard(0), Shard(1)], [Shard(1), Shard(0)], [Shard(0), Shard(0)], [Replicate(), Shard(2)]]
    checked = 0
    for sizes, ways in cuts.items():
        mesh = init_device_mesh("cpu", sizes)
        for placements in ways:
            for shape in [(), (1,), (3,), (9,), (5, 7), (1, 9), (8, 1), (3, 5, 2), (4, 3, 6), (0, 3)]:
                if any(isinstance(x, Shard) and x.dim >= len(shape) for x in placements):
                    continue
                p = distribute_tensor(torch.arange(torch.Size(shape).numel()).view(shape), mesh, placements)
                length, starts = runs_of("p", p)
                found = torch.cat([torch.arange(start, start + length) for start in starts])
                assert torch.equal(found, local(p).reshape(-1)), (shape, placements)
                checked += 1
    p = DTensor.from_local(torch.ones(3), mesh, [Partial(), Replicate()])
    with pytest.raises(
        ValueError, match="p: expected a DTensor that is sharded or replicated, got P.*: redistribute it"
    ):
        runs_of("p", p)
    return checked


def test_runs_say_where_the_elements_of_shards_are():
    assert ranks.run(whereabouts, 4) == [50] * 4


def one_step_ahead():
    """Replicas of a shard are compared: what is said when one differs. States are of shards, and a run goes on."""
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2, 2))
    model = shard(network(torch.bfloat16), mesh, [Replicate(), Shard(0)])
    opt = zo_core.MeZO(model, lr=1e-2, processes=Parallel(check_every=1))

    def loss():
        return sum(p.full_tensor().float().square().sum() for p in model.parameters())

    opt.step(loss)
    opt.step(loss)
    copied = [local(p).clone() for p in model.parameters()]
    state = copy.deepcopy(opt.state_dict())
    opt.step(loss)
    after = gathered(model)
    for p, value in zip(model.parameters(), copied, strict=True):
        local(p).copy_(value)
    opt.load_state_dict(state)
    opt.step(loss)
    assert all(map(torch.equal, after, gathered(model)))
    if rank == 3:
        local(model.first.weight)[2, 1] += 1
    with pytest.raises(RankError) as caught:
        opt.step(loss)
    return str(caught.value)


def test_replicas_of_a_shard_are_compared_and_states_go_on():
    for text in ranks.run(one_step_ahead, 4):
        assert text.startswith("first.weight: differs between ranks at step 3") and "in rank 1; " in text


def evaluated():
    """Whether a run after an evaluation, which leaves FSDP2's root gathered, is one without it; other starts and states."""
    ends = []
    for evaluate in (False, True):
        model = fsdp(network())
        if evaluate:
            model(X)
            with pytest.raises(ValueError, match="params: first.weight.*no parameter of the module as it is when"):
                zo_core.MeZO(list(model.named_parameters()), lr=1e-2, module=model, processes=Parallel())
            model(X)
        opt = zo_core.HiZOO(model, lr=1e-2, processes=Parallel())
        for _ in range(3):
            opt.step(lambda model=model: (model(X) - Y).square().mean())
        ends.append(gathered(model))
    states = [None] * dist.get_world_size()
    dist.all_gather_object(states, opt.state_dict())
    with pytest.raises(ValueError, match="state_dict: it is of other shards"):
        opt.load_state_dict(states[dist.get_rank() - 1])
    opt.load_state_dict(states[dist.get_rank()])
    return all(map(torch.equal, *ends))


def test_an_evaluation_before_the_run_changes_nothing():
    assert all(ranks.run(evaluated, 2))


def checkpointed(folder):
    """Losses after a checkpoint, and of a run that loads it, in as many processes and by way of whole tensors."""
    ends, options = [], dcp.state_dict.StateDictOptions(full_state_dict=True)
    for method, own in ((zo_core.MeZO, {"dtype": torch.bfloat16}), (zo_core.HiZOO, {})):
        pairs = []
        for _ in range(3):
            model = fsdp(network(**own))
            pairs.append((model, method(model, lr=2e-2, eps=0.1, processes=Parallel(check_every=1))))
        losses = []

        def go_on(i, steps, pairs=pairs, losses=losses):
            model, opt = pairs[i]
            loss = lambda: (model(X.to(model.first.weight.dtype)).float() - Y).square().mean()  # noqa: E731
            losses.append([float(opt.step(loss)) for _ in range(steps)])

        with warnings.catch_warnings():
            warnings.simplefilter("error")  # that residuals start from 0
            warnings.filterwarnings("ignore", ".*(eps=|deprecated|typed|full_tensor|overlap)")
            go_on(0, 5)
            saved = [dict(zip(("model", "opt"), dcp.state_dict.get_state_dict(*pair), strict=True)) for pair in pairs]
            dcp.save(saved[0], checkpoint_id=f"{folder}/{method.__name__}")
            dcp.load(saved[1], checkpoint_id=f"{folder}/{method.__name__}")
            whole = dcp.state_dict.get_state_dict(*pairs[0], options=options)
            for pair, state, how in (
                (pairs[1], (saved[1]["model"], saved[1]["opt"]), None),
                (pairs[2], whole, options),
            ):
                dcp.state_dict.set_state_dict(*pair, model_state_dict=state[0], optim_state_dict=state[1], options=how)
            for i in range(3):
                go_on(i, 3)
        assert losses[1] == losses[2] == losses[3], (method, losses)
        ends += [[gathered(model) for model, _ in pairs]]
    return all(all(map(torch.equal, x, y)) for first, *rest in ends for x in rest for y in [first])


def test_torch_s_distributed_checkpoint_saves_shards_from_which_a_run_goes_on(tmp_path):
    assert all(ranks.run(checkpointed, 2, str(tmp_path)))


def frozen_shards(sharded):
    """Weights after steps of a model whose blocks are frozen, and sharded."""
    model = network()
    model.blocks.requires_grad_(False)
    if sharded:
        for block in model.blocks:
            fully_shard(block, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    options = {"processes": Parallel()} if sharded else {"engine": "inplace"}
    opt = zo_core.MeZO(model, lr=1e-2, **options)
    for _ in range(5):
        opt.step(lambda: (model(X) - Y).square().mean())
    return opt.engine, gathered(model)


def test_frozen_shards_are_left_to_their_forwards():
    engine, alone = frozen_shards(False)
    for found, weights in ranks.run(frozen_shards, 2, True):
        assert found == engine and all(map(torch.equal, weights, alone))


def uneven_grid():
    """Elements of FSDP2's shards of tensor-parallel rows, of sizes that leave some ranks with fewer, or none."""
    mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("data", "tensor"))
    for rows in (1, 2, 4, 7, 13):
        model = nn.Linear(2, rows)
        model.weight = nn.Parameter(torch.arange(2.0 * rows).view(rows, 2))
        fully_shard(shard(model, mesh["tensor"], [Shard(0)]), mesh=mesh["data"])
        length, starts = runs_of("weight", model.weight)
        found = torch.cat([torch.arange(start, start + length) for start in starts])
        assert torch.equal(found, local(model.weight).reshape(-1).long()), rows
    return True


def test_rows_of_tensor_parallel_shards_may_be_uneven():
    assert all(ranks.run(uneven_grid, 6))


def refusals():
    model = fsdp(network())
    with pytest.raises(ValueError, match="sharded .DTensors.: pass processes"):
        zo_core.MeZO(model, lr=1e-3)
    with pytest.raises(ValueError, match="module=.*gathers them anew|and the module"):
        zo_core.MeZO(model.parameters(), lr=1e-3, processes=Parallel())
    with pytest.raises(ValueError, match="engine: 'shadow' cannot serve sharded weights"):
        zo_core.MeZO(model, lr=1e-3, engine="shadow", processes=Parallel())
    with pytest.raises(ValueError, match="probes=1 with engine='inplace', got 2"):
        zo_core.MeZO(model, lr=1e-3, processes=Parallel(probes=2))
    with pytest.raises(ValueError, match="hessian: 'factored' needs whole rows"):
        zo_core.HiZOO(model, lr=1e-3, hessian="factored", processes=Parallel())
    opt = zo_core.MeZO(model, lr=1e-3, processes=Parallel())
    with pytest.raises(zo_core.JournalError, match="expected whole weights"):
        zo_core.Journal.create("no.zoj", opt)
    opt = zo_core.MeZO(network(), lr=1e-3)
    with pytest.raises(ValueError, match="sharded .DTensors.: pass processes"):
        opt.add_param_group({"params": list(model.named_parameters())})
    assert len(opt.param_groups) == 1
    mesh = init_device_mesh("cpu", (2,))
    across = DTensor.from_local(torch.ones(4, 3).T, mesh, [Shard(0)], run_check=False)
    with pytest.raises(ValueError, match="w: expected a contiguous shard, got strides"):
        runs_of("w", across)
    opt = zo_core.MeZO(shard(network(), mesh, [Shard(0)]), lr=1e-3, processes=Parallel())
    assert opt.step(lambda: distribute_tensor(torch.tensor(2.0), mesh, [Replicate()])) == 2
    with pytest.raises(ValueError, match="params: expected the module without DistributedDataParallel"):
        zo_core.MeZO(nn.parallel.DistributedDataParallel(network()), lr=1e-3)
    return True


def test_what_shards_cannot_have_is_refused():
    assert all(ranks.run(refusals, 2))


def test_where_a_row_of_the_whole_tensor_is_in_a_shard():
    whole = torch.arange(40).view(8, 5)
    for length, starts in ((10, [15]), (2, [1, 6, 11, 16, 21, 26, 31, 36]), (40, [0]), (0, [0])):
        shard = torch.cat([whole.view(-1)[start : start + length] for start in starts])
        pieces = Pieces([Runs(length, starts)], [5], torch.device("cpu"))
        for row in range(8):
            found = torch.cat([shard[part] for part in pieces.places(0, 5 * row, 5 * row + 5)] or [shard[:0]])
            assert found.tolist() == [x for x in whole[row].tolist() if x in shard.tolist()]
