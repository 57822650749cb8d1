"""A scale for each tensor's probe: how scales are given, where they act, and what a calibration finds. (Steps: test_twins.py.)"""

import copy
import json
import math
import statistics
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict
from torch import nn
from toys import same

import zo_core
from zo_core import Journal, JournalError, calibration, scales
from zo_core.journal import Header

ROWS = torch.arange(24).view(4, 6) % 17
GIVEN = {"layers.1.norm.weight": 0.5, "*.norm.*": 3.0, "layers.*.up.weight": 1.5, "embed.weight": 0.25}


class Net(nn.Module):
    """An embedding with a padding row, which is not the first tensor, two layers with norms, and a head."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"norm": nn.LayerNorm(8), "up": nn.Linear(8, 8)}) for _ in range(2))
        self.embed = nn.Embedding(60, 8, padding_idx=3)  # more rows than are looked up
        self.head = nn.Linear(8, 5, bias=False)

    def forward(self, rows):
        x = self.embed(rows)
        for layer in self.layers:
            x = x + torch.tanh(layer["up"](layer["norm"](x)))
        return self.head(x)


def network(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        return Net().to(dtype)


def loss_of(model):
    return lambda: model(ROWS).float().logsumexp(-1).square().mean()


def run(model, opt, steps=3):
    return [float(opt.step(loss_of(model))) for _ in range(steps)]


# ---- as they are given -------------------------------------------------------------------------------------------


def test_the_first_entry_that_matches_is_a_tensor_s_scale_and_probes_keep_their_length():
    model = network()
    named = dict(model.named_parameters())
    plain = zo_core.MeZO(model, lr=1e-3, scales=GIVEN, normalize_scales=False).scales
    assert plain["layers.1.norm.weight"] == 0.5 and plain["layers.1.norm.bias"] == plain["layers.0.norm.weight"] == 3
    assert (plain["layers.0.up.weight"], plain["layers.0.up.bias"], plain["embed.weight"]) == (1.5, 1.0, 0.25)
    found = zo_core.MeZO(model, lr=1e-3, scales=GIVEN).scales
    d = sum(p.numel() for p in named.values())
    assert sum(named[n].numel() * x**2 for n, x in found.items()) == pytest.approx(d, rel=1e-6)
    assert len({round(found[n] / plain[n], 5) for n in plain}) == 1
    again = zo_core.MeZO(model, lr=1e-3, scales=found)
    assert again.scales == found  # to the last bit, so that a journal of them goes on
    again.scales = list(plain.values())
    assert again.scales == found
    again.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert [*again.scales.values()] == [*found.values(), 1.0]
    model.head.weight.requires_grad_(False)
    zo_core.MeZO(model, lr=1e-3, scales={"head.weight": 2.0})  # of the model, though not trained


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers.0.up.weigth": 2.0}, r"none is called 'layers.0.up.weigth'; did you mean 'layers.0.up.weight'\?"),
        ({"*.q_proj.*": 2.0}, r"none is called '\*.q_proj.\*'"),
        ({"embed.weight": 0.0}, r"scales: 'embed.weight': expected a positive finite number, got 0.0"),
        ({"embed.weight": float("nan")}, "'embed.weight': expected a positive finite number, got nan"),
        ({"embed.weight": "2"}, "'embed.weight': expected a positive finite number, got '2'"),
        ({"embed.weight": True}, "got True"),
        ({3: 1.0}, "expected names of tensors, got 3"),
        ([1.0, 2.0], "a number for each of the 10 trained tensors, got 2"),
        (torch.ones(10).index_fill(0, torch.tensor([2]), -1), r"layers.0.up.weight: expected a positive"),
        (2.0, "expected numbers by tensor name, the path of a file of them, or one number for each tensor, got 2.0"),
        ({"head.weight": 1e-9}, r"head.weight: expected a number from 1e-06 to 1e\+06.*to leave a tensor out, freeze it"),
    ],
)  # fmt: skip
def test_what_are_no_scales_is_refused_by_name(given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        zo_core.MeZO(network(), lr=1e-3, scales=given)


def test_a_file_of_scales_is_json_by_name(tmp_path):
    path = tmp_path / "scales.json"
    scales.save(GIVEN, path)
    assert json.loads(path.read_text()) == GIVEN == scales.load(path)
    assert zo_core.MeZO(network(), lr=1e-3, scales=path).scales == zo_core.MeZO(network(), lr=1e-3, scales=GIVEN).scales
    with pytest.raises(ValueError, match="'a': expected a positive finite number, got inf"):
        scales.save({"a": float("inf")}, path)
    for text, message in (
        ("[1]", "expected a JSON object .* got a list"),
        ("{", "expected a JSON object"),
        ('{"a": "x"}', "'a': expected a positive finite number, got 'x'"),
        ('{"a": NaN}', "'a': expected a positive finite number, got nan"),
        ('{"a": 1, "a": 2}', "'a' is in it twice"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            scales.load(path)
    with pytest.raises(OSError, match=r"none\.json"):
        zo_core.MeZO(network(), lr=1e-3, scales=str(tmp_path / "none.json"))


def test_kinds_are_roles_whatever_the_layer():
    kinds = {
        "model.layers.3.self_attn.v_proj.weight": "self_attn.v_proj",
        "model.layers.3.input_layernorm.weight": "norm",
        "transformer.h.0.ln_1.bias": "norm",
        "transformer.h.0.mlp.c_fc.bias": "bias",
        "transformer.wte.weight": "embedding",
        "model.embed_tokens.weight": "embedding",
        "model.layers.0.block_sparse_moe.experts.7.w1.weight": "block_sparse_moe.experts.w1",
        "lm_head.weight": "lm_head",
        "0.weight": "weight",
    }
    assert scales.kinds(kinds) == kinds
    by_kind = scales.by_kind(network(), {"norm": 4.0, "up": 2.0})
    assert (
        by_kind["layers.1.norm.bias"] == 4 and by_kind["layers.0.up.weight"] == 2 and "layers.0.up.bias" not in by_kind
    )
    with pytest.raises(ValueError, match=r"patterns of kinds, none is called 'norms'; did you mean 'norm'\?"):
        scales.by_kind(network(), {"norms": 2.0})


def test_eps_is_compared_with_the_weights_spacing_times_the_scale():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        zo_core.MeZO(
            network(torch.bfloat16), lr=1e-3, eps=0.1, scales={"layers.0.norm.weight": 1e-3}, normalize_scales=False
        )
    assert ["eps=0.1 times its scale" in str(w.message) for w in caught] == [True]
    assert "of layers.0.norm.weight:" in str(caught[0].message)


# ---- where they act ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (zo_core.MeZO, {"engine": "inplace", "rho": 0.5, "blocks": "layers"}),
        (zo_core.HiZOO, {"engine": "shadow", "smoothing": 1e-2}),
        (zo_core.FZOO, {"engine": "grouped", "distribution": "factored", "rank": 2, "probes": 3}),
        (zo_core.FZOO, {"engine": "grouped", "probes": 3}),
    ],
)
def test_scales_of_1_are_the_bits_of_no_scales(method, options):
    one, other = network(), network()
    plain, scaled = method(one, lr=1e-2, **options), method(other, lr=1e-2, **options)
    scaled._own["scales"], scaled._engine = (1.0,) * 10, None
    assert run(one, plain) == run(other, scaled) and same(one, other)
    assert "scales" not in method(network(), lr=1e-2, scales={}, **options)._own


@pytest.mark.parametrize("noise", [{}, {"distribution": "factored"}, {"distribution": "factored", "rank": 3}], ids=str)
def test_engines_agree(noise):
    model, found = network(), []
    points = [(0.0, None), *((c, torch.tensor([7])) for c in (0.02, -0.02)), (0.05, torch.tensor([8]))]
    for engine in ("inplace", "shadow", "grouped"):
        opt = zo_core.MeZO(model, lr=1e-3, engine=engine, scales=GIVEN, normalize_scales=False, **noise)
        for left_out in ((), {2, 3, 4}):
            with torch.no_grad():
                found.append(opt._prepare().evaluate_all(lambda: loss_of(model)().double(), points, left_out))
                opt._engine.restore()
        assert getattr(opt._engine, "alone", None) is None
        assert getattr(opt._engine, "_known", True)
    for at in (0, 1):
        one, *others = found[at::2]
        assert (one[1:] - one[0]).abs().min() > 1e-4
        assert all(torch.allclose(one, other, rtol=2e-5) for other in others)


@pytest.mark.parametrize(
    ("method", "options"),
    [(zo_core.MeZO, {"probes": 2, "rho": 0.5, "blocks": "layers"}), (zo_core.HiZOO, {"smoothing": 1e-2})],
)
def test_a_journal_has_the_scales_and_goes_on_with_no_others(tmp_path, method, options):
    model, base, path = network(), network(), tmp_path / "run.zoj"
    opt = method(model, lr=1e-2, scales=GIVEN, **options)
    opt.journal = Journal.create(path, opt)
    run(model, opt)
    opt.scales = {"embed.weight": 0.5}
    before = copy.deepcopy(model)
    with pytest.raises(
        JournalError, match=r"scales: expected \d\S+ for layers.0.norm.weight, got \d\S+, and other ones for 9 more"
    ):
        run(model, opt, 1)
    assert same(model, before)
    opt.journal.close()
    zo_core.replay(base, path)
    assert same(model, base)
    for other, match in (
        (None, r"expected \d\S+ for layers.0.norm.weight, got 1"),
        ({**GIVEN, "head.weight": 2.0}, "scales: expec"),
    ):
        with pytest.raises(JournalError, match=match):
            Journal.recover(path, method(network(), lr=1e-2, scales=other, **options))
    header = Journal.open(path).header
    text = json.loads(header.text())
    assert Header.parse(header.text()) == header and len(text["scales"]) == 10
    for wrong in ([1.0], [*text["scales"][1:], -1.0], [*text["scales"][1:], 0.1], [*text["scales"][1:], "1"], 3):
        with pytest.raises(JournalError, match=r"its header"):
            Header.parse(json.dumps({**text, "scales": wrong}).encode())


def test_a_state_has_the_scales_and_goes_on_with_no_others(tmp_path):
    model, opts = network(), {}
    opts["first"] = opt = zo_core.FZOO(model, lr=1e-2, reuse=True, scales=GIVEN)
    run(model, opt)
    state = copy.deepcopy(opt.state_dict())
    for name, given in (("same", GIVEN), ("none", None)):
        mine = copy.deepcopy(model)
        other = zo_core.FZOO(mine, lr=1e-2, reuse=True, scales=given)
        other.load_state_dict(state)
        opts[name], expected = other, copy.deepcopy(opt)
        assert other.scales == opt.scales == expected.scales
    continued = [(x.module, float(x.step(loss_of(x.module)))) for x in opts.values()]
    assert len({loss for _, loss in continued}) == 1 and all(same(model, m) for m, _ in continued)
    for given, match in (({"embed.weight": 2}, r"scales: expected .* for layers.0.norm.weight, got \d"),):
        with pytest.raises(ValueError, match=match):
            zo_core.FZOO(network(), lr=1e-2, reuse=True, scales=given).load_state_dict(state)
    without = zo_core.FZOO(network(), lr=1e-2, reuse=True).state_dict()
    with pytest.raises(
        ValueError, match=r"state_dict: scales: expected \d\S+ for layers.0.norm.weight, got 1.*: make the optimizer"
    ):
        zo_core.FZOO(network(), lr=1e-2, reuse=True, scales=GIVEN).load_state_dict(without)
    dcp.save({"opt": dcp.state_dict.get_optimizer_state_dict(model, opt)}, checkpoint_id=tmp_path)
    fresh = network()
    other = zo_core.FZOO(fresh, lr=1e-2, reuse=True)
    found = {"opt": dcp.state_dict.get_optimizer_state_dict(fresh, other)}
    dcp.load(found, checkpoint_id=tmp_path)
    dcp.state_dict.set_optimizer_state_dict(fresh, other, found["opt"])
    assert other.scales == opt.scales and other.updates == opt.updates


# ---- calibration -------------------------------------------------------------------------------------------------


class Bowl(nn.Module):
    """l = sum_t (g_t (x - x0) + h_t / 2 |x - x0|^2) at x0: known slopes and traces by kind."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.random.default_generator.manual_seed(1)
            self.embed, self.norm = nn.Embedding(30, 40), nn.LayerNorm(64)
            self.layers = nn.ModuleList(nn.Linear(20, 20, bias=False) for _ in range(2))
            self.slopes = [
                torch.randn(p.shape) * x for p, x in zip(self.parameters(), (0.1, 3, 3, 0.01, 0.01), strict=True)
            ]
        self.start = [p.detach().clone() for p in self.parameters()]
        self.register_buffer("calls", torch.zeros(()))

    def forward(self):
        self.calls += 1
        torch.rand(())
        triples = zip(self.parameters(), self.start, self.slopes, strict=True)
        return sum((g * (p - x)).sum() + (p - x).square().sum() / 2 for p, x, g in triples).double()

    def known(self):
        """|g|^2 and trace by kind."""
        out = {}
        for (name, p), g in zip(self.named_parameters(), self.slopes, strict=True):
            a, b = out.get(scales.kind_of(name), (0, 0))
            out[scales.kind_of(name)] = a + float(g.square().sum()), b + p.numel()
        return out


@pytest.mark.parametrize("engine", ["shadow", "inplace"])
def test_a_calibration_finds_slopes_and_curvatures_by_kind_and_changes_nothing(engine):
    bowl = Bowl()
    opt = zo_core.MeZO(bowl, lr=1e-3, eps=1e-2, engine=engine, seed=3, scales={"embed.weight": 2.0})
    state, rng, given = str(opt.state_dict()), torch.get_rng_state(), opt.scales
    found = zo_core.calibrate(opt, bowl, 450, apply=False)
    assert all(torch.equal(p, x) for p, x in zip(bowl.parameters(), bowl.start, strict=True)) and bowl.calls == 0
    assert str(opt.state_dict()) == state and torch.equal(torch.get_rng_state(), rng) and opt.scales == given
    assert found.evaluations == 450 and found.noise < 1e-5
    for kind in found.kinds:
        slope2, trace = bowl.known()[kind.name]
        assert abs(kind.slope2 - slope2) < 4 * kind.slope2_error and kind.slope2_error < 0.25 * kind.slope2
        assert kind.curvature == pytest.approx(trace, rel=0.05)
    embedding, norm, layers = found.kinds
    assert norm.scale / layers.scale == pytest.approx(4, rel=1e-3)  # 2 and 1/2: the best, within their range
    assert norm.scale / embedding.scale == pytest.approx(4, rel=1e-3) and found.gain > 4
    assert found["layers.0.weight"] == found["layers.1.weight"] == layers.scale
    zo_core.calibrate(opt, bowl, 450)
    assert opt.scales == dict(found)
    few = zo_core.calibrate(opt, [bowl, bowl], 18).kinds
    assert 1 < max(k.scale for k in few) / min(k.scale for k in few) < 3.9  # less is known, so less is dared


def test_scales_follow_from_slopes_and_curvatures_as_the_docstring_says():
    slopes, curvatures = [[10, 1, 11 + 3**0.5], [8, -1, 7 - 3**0.5]], [[3.0, 1, 0], [5, 2, 0]]
    eps = [0.5, 1.0, 1.0]
    tables = [torch.tensor(x, dtype=torch.float64) for x in (eps, slopes, curvatures)]
    found = calibration._choose({"a": [0], "b": [1]}, calibration._Probes(*tables), ["a", "b"], [300, 500])

    v = 3 / (0.5 * (4 + 1 + 1))  # slopes of all are off by 3^1/2, whose variance is the sum of v / (2 eps^2)
    noise, q, h = [v / 0.5, v / 2], [(100 + 64) / 2, 1], [4, 1.5]
    scatter = [2 * 0.5**4, 0.5]  # variances times eps^4
    scatter = [(x + 2 * sum(scatter) / 2) / 3 for x in scatter]
    error = [(scatter[0] / 2 + 4 * v) ** 0.5 / 0.25, (scatter[1] / 2 + 4 * v) ** 0.5]
    normal, s = statistics.NormalDist(), [1.0, 1.0]
    quantiles = [normal.inv_cdf((i + 0.5) / 1000) for i in range(1000)]
    for _ in range(40):
        ratio = sum(x**2 * (a - n) for x, a, n in zip(s, q, noise, strict=True)) / (s[0] ** 2 * h[0] + s[1] ** 2 * h[1])
        for i in (0, 1):
            least = [max(ratio * (h[i] + error[i] * z), 0) + noise[i] for z in quantiles]
            p = sum(1 - math.exp(-2 * q[i] / x / 2) for x in least) / 1000  # chi^2 of two degrees of freedom
            s[i] = 2 ** (max(1 - noise[i] / q[i], 0) * (2 * p - 1))
    assert found["a"] / found["b"] == pytest.approx(s[0] / s[1], rel=1e-2) and s[0] / s[1] > 1.3
    assert found.noise == pytest.approx(v**0.5)
    assert [k.slope2 for k in found.kinds] == pytest.approx([a - n for a, n in zip(q, noise, strict=True)])
    assert [k.curvature_error for k in found.kinds] == pytest.approx(error)
    assert 300 * found["a"] ** 2 + 500 * found["b"] ** 2 == pytest.approx(800)


def test_a_calibration_of_noise_leaves_scales_at_1_and_of_an_error_nothing_behind():
    bowl, calls = Bowl(), 0
    opt = zo_core.MeZO(bowl, lr=1e-3, eps=1e-4, engine="inplace")
    noise = torch.randn(200, generator=torch.Generator().manual_seed(0)).double()

    def noisy(fail_at=0):
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise KeyError("mine")
        return bowl() * 1e-6 + noise[calls]

    found = zo_core.calibrate(opt, noisy, 48)
    assert found.noise == pytest.approx(1, rel=0.6) and set(found.values()) == {1.0}
    calls = 0
    with pytest.raises(KeyError, match="mine"):
        zo_core.calibrate(opt, lambda: noisy(12), 48)
    assert all(torch.equal(p, x) for p, x in zip(bowl.parameters(), bowl.start, strict=True))
    assert opt.scales == dict(found) and not opt._stepping
    with pytest.raises(ValueError, match="closure: expected finite losses"):
        zo_core.calibrate(opt, lambda: float("nan"), 48)
    for evaluations in (13, 48.0):
        with pytest.raises(ValueError, match="evaluations: expected an integer of at least 14"):
            zo_core.calibrate(opt, bowl, evaluations)
    with pytest.raises(TypeError, match="closure: expected a function"):
        zo_core.calibrate(opt, 3)
    assert (
        len(zo_core.calibrate(opt, bowl, 14).kinds) == 2
    )  # there are three; the two of fewest weights but norms are one
