"""Factored probes from the options of a run to its journal, checkpoint, shards and command line."""

import numpy as np
import pytest
import torch
from torch import nn
from zo_core.kernels import reference

import zo_core
import zo_core.journal
from zo_core import Journal, JournalError
from zo_core.arrays import perturb_
from zo_core.integrations.config import FinetuneConfig
from zo_core.integrations.errors import RunError
from zo_core.sharding import Pieces, Runs

IDS, LABELS = torch.arange(12).view(3, 4) % 9, torch.tensor([1, 0, 5])


class Toy(nn.Module):
    """An embedding, of which a pass makes the rows that are read, a matrix and a vector."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.words, self.head = nn.Embedding(9, 10), nn.Linear(40, 6)
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=g) * 0.1)

    def loss(self):
        return nn.functional.cross_entropy(self.head(self.words(IDS).flatten(1)), LABELS)


def optimizer(model, method=zo_core.FZOO, **options):
    return method(model, **{"lr": 1e-2, "seed": 2**63 + 5, "distribution": "factored", "rank": 2, **options})


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_a_step_moves_along_the_noise_that_is_specified():
    """MeZO with the noise of each tensor's own shape; both engines take the same step."""
    models = [Toy() for _ in range(2)]
    losses = []
    for model, engine in zip(models, ("shadow", "inplace"), strict=True):
        opt = optimizer(model, zo_core.MeZO, engine=engine, eps=1e-2)
        losses.append(float(opt.step(model.loss)))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    before = Toy()
    z = [zo_core.noise.sample("factored", p.shape, seed=2**63 + 5, tensor_id=i, rank=2)
         for i, p in enumerate(before.parameters())]  # fmt: skip
    sides = []
    for sign in (1, -1):
        moved = Toy()
        for p, noise in zip(moved.parameters(), z, strict=True):
            p.data.add_(noise, alpha=sign * 1e-2)
        sides.append(moved.loss().item())
    g = (sides[0] - sides[1]) / 2e-2
    for p, noise, now in zip(before.parameters(), z, models[0].parameters(), strict=True):
        assert torch.allclose(now, p - 1e-2 * g * noise, atol=1e-6) and not torch.equal(now, p)


def test_a_run_is_replayed_recovered_and_resumed_bit_for_bit(tmp_path):
    model, path = Toy(), tmp_path / "run.zoj"
    opt = optimizer(model, probes=3)
    opt.journal = Journal.create(path, opt)
    for step in range(6):
        if step == 3:
            saved = {"model": {k: v.clone() for k, v in model.state_dict().items()}, "opt": opt.state_dict()}
        opt.step(model.loss)
    opt.journal.close()
    header = Journal.open(path).header
    assert (header.distribution, header.rank) == ("factored", 2)
    again = Toy()
    assert zo_core.replay(again, path) == 6 and same(again, model)
    recovered = Toy()
    Journal.recover(path, optimizer(recovered, probes=3), writable=False)
    assert same(recovered, model)
    resumed = Toy()
    resumed.load_state_dict(saved["model"])
    opt = optimizer(resumed, probes=3, distribution="rademacher", rank=1)  # what the state has is what goes on
    opt.load_state_dict(saved["opt"])
    for _ in range(3):
        opt.step(resumed.loss)
    assert same(resumed, model) and opt.state_dict()["state"][0]["zo"]["rank"] == 2
    with pytest.raises(JournalError, match="rank: expected 2 as in the journal, got 3"):
        Journal.recover(path, optimizer(Toy(), probes=3, rank=3))


def test_only_factored_noise_has_a_rank_in_states_and_headers(tmp_path):
    opt = optimizer(Toy(), distribution="rademacher", rank=1)
    header = zo_core.journal.Header.of(opt)
    assert "rank" not in opt.state_dict()["state"][0]["zo"] and b'"rank"' not in header.text()
    assert zo_core.journal.Header.parse(header.text()).rank == 1
    text = zo_core.journal.Header.of(optimizer(Toy())).text()
    for wrong in (b'"rank":0', b'"rank":1025', b'"rank":"2"', b'"rank":true'):
        with pytest.raises(JournalError, match="its header has wrong rank"):
            zo_core.journal.Header.parse(text.replace(b'"rank":2', wrong))
    with pytest.raises(JournalError, match="its header has wrong rank"):
        zo_core.journal.Header.parse(text.replace(b'"factored"', b'"gaussian"'))


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        (zo_core.MeZO, {"rank": 0}, ValueError, "rank: expected an integer from 1 to 1024, got 0"),
        (zo_core.MeZO, {"rank": 1.0}, TypeError, "rank: expected an integer, got 1.0"),
        (zo_core.SPSA, {"distribution": None}, ValueError, "rank: expected 1 with distribution 'rademacher', got 2"),
        (zo_core.HiZOO, {}, ValueError, "distribution: expected 'gaussian' with hessian 'diagonal', got 'factored'"),
        (zo_core.SPSA, {"hessian": "factored"}, ValueError, "distribution: expected 'gaussian' with hessian 'factored'"),
    ],
)  # fmt: skip
def test_what_cannot_go_together_is_refused_by_name(method, options, error, message):
    with pytest.raises(error, match=message):
        optimizer(Toy(), method, **options)


def test_spsa_measures_curvature_along_factored_probes():
    model = Toy()
    opt = optimizer(model, zo_core.SPSA, probes=2)
    opt.step(model.loss)
    assert opt.updates == 1 and not same(model, Toy())


def test_shards_have_the_noise_of_the_whole_tensor():
    """Columns 3 to 8 of a matrix, and the middle of a vector, as pieces of the whole."""
    whole, vector = torch.linspace(-1, 1, 70).view(7, 10), torch.linspace(0, 1, 20)
    parts = [whole[:, 3:8].clone(), vector[5:9].clone()]
    pieces = Pieces([Runs(5, [10 * i + 3 for i in range(7)]), Runs(4, [5])], [10, 0], torch.device("cpu"))
    scalars = {"streams": torch.tensor([4, 9]), "coeffs": torch.tensor([[0.1, 0.2], [-0.3, 0.4]]), "update": None}
    options = {"seed": 7, "distribution": "factored", "rank": 3, "residuals": None}
    counters = torch.zeros(3).long()
    pieces.update_(parts, [], **scalars, **options, counters=counters)
    torch.ops.zo_core.update_([whole, vector], [], [0, 1], [], **scalars, **options, counters=counters)
    assert torch.equal(parts[0], whole[:, 3:8]) and torch.equal(parts[1], vector[5:9])


def test_numpy_arrays_and_their_flat_slices():
    noise = {"seed": 3, "tensor_id": 2, "distribution": "factored", "rank": 2}
    whole, flat = np.zeros((6, 9), np.float32), np.zeros(54, np.float32)
    perturb_(whole, 5, 0.5, **noise)
    perturb_(flat[:20], 5, 0.5, **noise, columns=9)
    perturb_(flat[20:], 5, 0.5, **noise, columns=9, offset=20)
    assert np.array_equal(whole.ravel(), flat) and set(np.unique(np.abs(flat))) <= {
        0,
        np.float32(0.5) * np.float32(2**0.5),
    }
    z = reference.factored(torch.arange(54), tensor_id=2, stream=5, seed=3, columns=9, rank=2)
    assert np.allclose(flat, 0.5 * z.numpy(), atol=1e-6)


def test_the_command_line_passes_them_on():
    config = FinetuneConfig(method="mezo", distribution="factored", rank=2, steps=1)
    assert "--distribution factored --rank 2" in config.command()
    opt = config.optimizer(Toy())
    assert (opt._own["distribution"], opt._own["rank"]) == ("factored", 2)
    with pytest.raises(RunError, match="--method mezo: rank: expected 1 with distribution 'rademacher', got 2"):
        FinetuneConfig(method="mezo", rank=2, steps=1).optimizer(Toy())
