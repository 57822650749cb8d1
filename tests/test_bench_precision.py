"""bench.precision in small: the order of the errors, the gate, the study that goes on, the plot."""

import json

import pytest
import torch

from bench import precision

MARK, RATE = 20, 1e-6


@pytest.fixture(scope="module")
def found():
    return precision.displacement(64, [RATE], [2, MARK], ["bfloat16", "float32"], list(precision.WAYS))


def last(found, lr):
    """By dtype, way and what counts: the record after the last update."""
    return {(r["dtype"], r["way"], r["of"]): r for r in found[0] if r["updates"] == MARK and r["lr"] == lr}


def test_errors_are_in_the_order_of_the_bits_kept(found):
    at = last(found, RATE)
    values = {way: at["bfloat16", way, precision.VALUE]["error"] for way in ("residual 16", "residual 8")}
    nearest, stochastic, in_place, published = (
        at["bfloat16", way, "weight"]["error"] for way in ("nearest", "stochastic", "in place, nearest", "published")
    )
    assert values["residual 16"] < 1e-4 < 1e-3 < values["residual 8"] < 0.02 < 0.3 < nearest < in_place < 2 * published
    assert stochastic < in_place
    assert at["float32", "nearest", "weight"]["error"] == pytest.approx(values["residual 16"], rel=1e-3)


def test_a_weight_alone_is_less_exact_than_with_its_residual(found):
    at = last(found, RATE)
    value, weight = (at["bfloat16", "residual 16", of] for of in (precision.VALUE, "weight"))
    assert weight["error"] > 100 * value["error"] and weight["moved"] < value["moved"]


def test_probes_alone_change_only_what_is_perturbed_in_place(found):
    for (dtype, way, of), r in last(found, 0.0).items():
        how = precision.WAYS[way]
        if how.engine == "shadow":
            assert r["change"] == r["moved"] == 0
        elif of == precision.VALUE or not how.residual:  # of what a residual belongs to hardly anything shows
            assert r["change"] > (0.01 if dtype == "bfloat16" and not how.residual else 0)


def test_the_gate_passes_these_and_no_others(found):
    records, reached = found
    precision.gate(records, reached)
    key = ("bfloat16", "residual 16", RATE)
    with pytest.raises(SystemExit, match="residual 16"):
        precision.gate(records, reached | {key: 1.01 * reached[key]})
    for change in ({"lr": RATE, "error": 2e-3}, {"lr": 0.0, "moved": 1e-6}):
        wrong = [r | change if (r["dtype"], r["way"], r["lr"]) == ("float32", "nearest", change["lr"]) else r
                 for r in records]  # fmt: skip
        with pytest.raises(SystemExit, match="no figure"):
            precision.gate(wrong, reached)


def run(way, seed, loss):
    report = {"loss": loss, "accuracy": 0.5}
    return {"way": way, "seed": seed, "before": report, "after": report, "seconds": 1.0, "losses": [loss, loss]}


def test_differences_are_paired_by_seed():
    ways = precision.summarize(
        [run(precision.FLOAT32, s, s) for s in range(3)]
        + [run("bfloat16, nearest", s, s + d) for s, d in ((1, 1), (2, 3))]
    )
    loss = ways["bfloat16, nearest"]["loss"]
    assert loss["difference"] == {"mean": 2, "se": pytest.approx(1)}
    assert ways[precision.FLOAT32]["loss"]["after"] == {"mean": 1, "sd": 1}


def test_a_study_goes_on_where_it_was_and_keeps_the_other_part(tmp_path, monkeypatch):
    done, path = [], tmp_path / "x.json"

    def train(way, config, title):
        done.append((way, config.dtype, config.seed))
        if len(done) == 3:
            raise KeyboardInterrupt
        return {k: v for k, v in run("", 0, 1.0).items() if k not in ("way", "seed")}

    monkeypatch.setattr(precision, "train", train)
    precision.keep(path, other={"kept": 1})
    command = ["--part", "training", "--seeds", "2", "--json", str(path), "--plot", str(tmp_path / "x.png")]
    with pytest.raises(KeyboardInterrupt):
        precision.main(command)
    assert len(json.loads(path.read_text())["training"]["runs"]) == 2
    precision.main(command)
    assert len(done) == 14 and done[2] == done[3]  # 7 ways of seed 0, 6 of seed 1, one of them twice
    precision.main(command)
    assert len(done) == 14
    precision.main([*command, "--steps", "3", "--ways", "float32"])
    precision.main([*command, "--no-resume"])
    result = json.loads(path.read_text())
    assert len(done) == 14 + 2 + 13 and len(result["training"]["runs"]) == 13 + 2
    assert result["other"] == {"kept": 1} and (tmp_path / "x.png").stat().st_size > 10_000


def test_the_global_generator_is_left_alone(found):
    before = torch.get_rng_state()
    precision.displacement(8, [RATE], [2], ["bfloat16"], ["published", "nearest"])
    assert torch.equal(before, torch.get_rng_state())
