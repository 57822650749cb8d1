"""The instruction budgets of the Triton pass (bench/sass.py): compiled here, on a machine without a GPU."""

import json
import os

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, so not in the interpreter", allow_module_level=True)

from zo_core.kernels.triton.compiled import architectures

from bench import sass
from bench.sass import Form


def listing(*lines: str) -> str:
    return "\n".join(x if x.startswith(".L") else f"        /*{16 * i:04x}*/  {x} ;" for i, x in enumerate(lines))


LOOPS = listing(
    "S2R R0, SR_TID.X",
    ".L_x_0:",
    "LDG.E.128 R4, [R2.64]",
    ".L_x_1:",  # a stream
    "@P0 BRA `(.L_x_2)",
    "FFMA R1, R1, R1, R1",
    "FFMA R1, R1, R1, R1",
    ".L_x_2:",
    "@P1 BRA `(.L_x_1)",
    "@P2 BRA P3, `(.L_x_3)",
    "STG.E.128 [R2.64], R4",
    "@!P4 CALL.REL.NOINC `(.L_x_4)",
    "BRA `(.L_x_0)",
    ".L_x_3:",  # seldom: stores in steps
    "STG.E.U16 [R2.64], R4",
    "BRA `(.L_x_0)",
    ".L_x_4:",
    "EXIT",
)


def test_the_path_goes_once_round_the_loop_of_whole_tiles_and_once_a_stream_round_the_one_inside():
    path = sass.tile_path(LOOPS, Form(k=3))
    assert path == {
        "LDG.E.128": 1, "FFMA": 6, "BRA": 3 * 2 + 2, "STG.E.128": 1, "CALL.REL.NOINC": 1,
    }  # fmt: skip


def test_a_kernel_without_128_bit_stores_is_an_error():
    with pytest.raises(ValueError, match="128-bit"):
        sass.tile_path(LOOPS.replace("STG.E.128", "STG.E.64"), Form())


def test_the_model_says_memory_bound_until_a_pipe_is_fuller():
    h200 = next(g for g in sass.GPUS if g.name == "H200")
    idle = dict.fromkeys(sass.PIPES, 0.0)
    assert sass.predict(idle, 0, 20, 4, h200) == 1
    # 27 issue slots a bf16 weight at copy bandwidth (design.md section 8), of which BUSY are filled
    assert sass.predict(idle, 0, 2 * 27 * sass.BUSY, 4, h200) == pytest.approx(0.5, rel=0.03)
    assert sass.predict(idle | {"xu": 16.0}, 0, 20, 4, h200) < 0.25


@pytest.mark.parametrize("bits", [8, 16])
def test_residuals_move_in_whole_registers(bits):
    """8 elements a thread: 64 or 128 bits of residuals, read and written for each 128 of weights; no local memory."""
    result = sass.judge(sass.Variant("", Form("rademacher", residual=bits)), 90)
    assert not result.problems and not result.local
    assert {f"{op}.E.{w}" for op in ("LDG", "STG") for w in (8 * bits, 128)} == set(result.widths)


def judged():
    """Every form on sm_80 and sm_90, which have budgets; each main one also on one of the other architectures, in turn."""
    others = [a for a in architectures() if a not in (80, 90)]
    yield from ((v, a) for v in sass.VARIANTS for a in (80, 90))
    yield from ((v, others[i % len(others)]) for i, v in enumerate(sass.MAIN))


@pytest.mark.parametrize(("variant", "capability"), list(judged()), ids=lambda x: getattr(x, "name", x))
def test_a_form_keeps_its_budget_moves_128_bits_and_spills_nothing(variant, capability):
    assert not sass.judge(variant, capability).problems


def test_the_program_writes_its_table_and_fails_where_a_form_is_over_its_budget(monkeypatch, tmp_path):
    for budget, status in ((100, 0), (1, 1)):
        monkeypatch.setattr(sass, "MAIN", (sass.Variant("one", Form("rademacher"), budget),))
        assert sass.main(["--fast", "--json", str(tmp_path / "sass.json")]) == status
        table = json.loads((tmp_path / "sass.json").read_text())
        assert [(r["name"], r["capability"], bool(r["problems"])) for r in table] == [
            ("one", 80, bool(status)),
            ("one", 90, bool(status)),
        ]


@pytest.mark.parametrize("capability", [80, 90])
def test_eight_streams_cost_at_most_twenty_instructions(capability):
    result = sass.judge(next(v for v in sass.VARIANTS if v.form == Form("rademacher", k=8)), capability)
    assert not result.problems and result.total <= 20


def test_scales_in_factors_cost_at_most_eight_instructions():
    for distribution, src in (("gaussian", "bfloat16"), ("gaussian", "float32"), ("rademacher", "bfloat16")):
        plain, scaled = (sass.judge(sass.Variant("", Form(distribution, src, scale=s)), 90) for s in ("", "factors"))
        assert not scaled.problems and scaled.total <= plain.total + 8


@pytest.mark.parametrize("architecture", ["gfx90a", "gfx942"])
def test_forms_for_amd_are_counted_and_spill_nothing(architecture):
    result = sass.count_for_amd(sass.VARIANTS[0], architecture)
    assert 30 < result.total < 70 and not result.local and result.pipes["alu"] > result.pipes["lsu"] > 0
