"""The known answers by which a backend is checked on the user's device: right on every backend here, and each finds its fault.

Under ``TRITON_INTERPRET=1`` the backend is Triton's; the tests in ``tests/ptx`` run the answers on the kernels as compiled.
"""

from types import SimpleNamespace

import pytest
import torch
from zo_core.kernels import reference, selfcheck

CPU = torch.device("cpu")


def test_every_backend_gives_the_known_answers(backend):
    assert selfcheck.run(backend, CPU) == {}


class Faulty:
    """The reference with a fault: before a pass ``before`` may change its arguments, after it ``after`` what was written."""

    def __init__(
        self, before=lambda job: None, after=lambda job: None, rows=lambda dst: None, words=lambda words: None
    ):
        self.before, self.after, self.rows, self.words = before, after, rows, words

    def run_pass(self, src, dst, hessians, tensor_ids, offsets, streams, coeffs, **options):
        lists = {"src": src, "dst": dst, "hessians": hessians, "tensor_ids": tensor_ids, "offsets": offsets}
        job = SimpleNamespace(**lists, streams=streams, coeffs=coeffs, options=options)
        self.before(job)
        reference.run_pass(*(getattr(job, n) for n in lists), job.streams, job.coeffs, **job.options)
        self.after(job)

    def run_rows(self, src, rows, dst, *args, **options):
        reference.run_rows(src, rows, dst, *args, **options)
        self.rows(dst)

    def philox_(self, words, **key):
        reference.philox_(words, **key)
        self.words(words)


def only(condition, **changes):
    """A fault in the passes that meet a condition: new values of their arguments."""

    def before(job):
        if condition(job):
            for name, change in changes.items():
                if name in job.options:
                    job.options[name] = change(job.options[name])
                else:
                    setattr(job, name, change(getattr(job, name)))

    return Faulty(before)


def residual(dtype):
    def after(job):
        for r in job.options.get("residuals", ()):
            if r.dtype == dtype:
                r[selfcheck.ENOUGH // 2] ^= 1

    return Faulty(after=after)


def one_further(job):
    if job.dst[0] is not job.src[0]:
        x = job.dst[0].view(torch.int16)
        x[-1] += 1


def first_of_unaligned(job):
    if job.dst[0].data_ptr() % 16:
        job.dst[0][0] += 1


FAULTS = {
    "Philox words": Faulty(words=lambda words: words[7].copy_(words[7].flip(0))),
    "Rademacher signs": only(lambda job: True, streams=lambda streams: streams & 0x7FFFFFFF),
    "Gaussian bounds": only(lambda job: job.options["distribution"] == "gaussian", coeffs=lambda c: c * (1 + 1e-5)),
    "rounding to nearest": Faulty(after=one_further),
    "stochastic rounding": only(
        lambda job: job.options.get("update") is not None and not job.options["residuals"],
        options=lambda options: options | {"update": options["update"] + 1},
    ),
    "residuals of 8 bits": residual(torch.int8),
    "residuals of 16 bits": residual(torch.int16),
    "sum of 8 streams": only(lambda job: len(job.streams) == 8, coeffs=lambda c: c * (torch.arange(8) < 7)[:, None]),
    "sum of 40 streams": only(
        lambda job: len(job.streams) == 40, coeffs=lambda c: c * (torch.arange(40) < 39)[:, None]
    ),
    "gathered rows": Faulty(rows=lambda dst: dst.copy_(dst.flip(0))),
    "Hessian": only(lambda job: job.hessians, smoothing=lambda smoothing: 0 * smoothing),
    "second moment": only(lambda job: "squares" in job.options, squares=lambda squares: 2 * squares),
    "scales in two factors": only(
        lambda job: "row_scales" in job.options, row_scales=lambda scales: [s.roll(1) for s in scales]
    ),
    "factored noise": only(
        lambda job: job.options["distribution"] == "factored", streams=lambda streams: streams.roll(1) + 1
    ),
    "slice": only(lambda job: True, offsets=lambda offsets: [o & 0xFFFFFFFF for o in offsets]),
    "unaligned view": Faulty(after=first_of_unaligned),
    "coefficient that is not finite": only(lambda job: True, coeffs=lambda c: c.nan_to_num()),
}


@pytest.mark.parametrize("name", selfcheck.ANSWERS)
def test_a_fault_turns_its_answer_red_and_no_other(name):
    wrong = selfcheck.run(FAULTS[name], CPU)
    assert list(wrong) == [name], wrong
    assert "differ" in wrong[name] or "off by" in wrong[name]


def test_what_is_raised_is_a_wrong_answer_unless_it_says_nothing_about_the_backend():
    def fails(error):
        def words(words):
            raise error

        return Faulty(words=words)

    assert selfcheck.run(fails(KeyError("ptxas")), CPU) == {"Philox words": "KeyError: 'ptxas'"}
    for error in (torch.OutOfMemoryError("no memory"), PermissionError("read-only")):
        with pytest.raises(type(error)):
            selfcheck.run(fails(error), CPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_answers_do_not_depend_on_the_default_dtype_nor_on_the_global_generator(dtype):
    state, before = torch.get_rng_state(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert selfcheck.run(reference, CPU) == {}
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(torch.get_rng_state(), state)
