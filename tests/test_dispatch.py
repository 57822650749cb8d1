"""Which backend serves which device: the table, the check on a GPU that is faked, what is remembered, and what it says."""

import json
import os
import subprocess
import sys
import threading
import tomllib
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from zo_core.bindings import cuda, native, ops
from zo_core.kernels import reference, selfcheck

from zo_core import weights

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
RIGHT, WRONG = cuda.Verdict({}, {"GPU": "H100"}), cuda.Verdict({"slice": "3 of 4 differ"}, {"GPU": "H100"})
TRITON = SimpleNamespace(__name__="zo_core.kernels.triton", VERSION="3.9.0", run_pass=reference.run_pass,
                         run_rows=reference.run_rows, philox_=reference.philox_)  # fmt: skip
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def undecided(monkeypatch):
    """No device has been decided on, and the Triton backend is a module that computes what the reference does."""
    monkeypatch.setattr(cuda, "_chosen", {})
    monkeypatch.setattr(cuda, "_triton", lambda: TRITON)
    monkeypatch.setattr(native, "CHOICE", "")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    ops._say_once.cache_clear()


@pytest.mark.parametrize(
    ("choice", "device", "verdict", "expected", "says"),
    [
        ("", GPU, RIGHT, TRITON, None),
        ("", GPU, WRONG, reference, "slice: 3 of 4 differ"),
        ("triton", GPU, RIGHT, TRITON, None),
        ("triton", GPU, WRONG, RuntimeError, "slice: 3 of 4 differ.*insists"),
        ("reference", GPU, None, reference, None),
        ("", CPU, None, native if native.available() else reference, None),
        ("triton", CPU, None, native if native.available() else reference, None),
        ("reference", CPU, None, reference, None),
        ("", torch.device("mps"), None, reference, "mps tensors take the slow torch reference"),
    ],
)
def test_the_table(monkeypatch, choice, device, verdict, expected, says):
    """A verdict of None: the check must not be made."""
    made = []
    monkeypatch.setattr(native, "CHOICE", choice)
    monkeypatch.setattr(cuda, "check", lambda device: made.append(device) or verdict)
    if expected is RuntimeError:
        with pytest.raises(RuntimeError, match=says):
            ops.backend_for(device)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert ops.backend_for(device) is ops.backend_for(device) is expected
    if device != CPU or native.available():
        assert len(caught) == (says is not None) and (says or "") in "".join(str(w.message) for w in caught)
    assert made == ([] if verdict is None else [device]), "checked once a process"


class OnGPU(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    device = GPU


def test_a_cuda_tensor_takes_triton_with_no_variable_set(monkeypatch):
    calls = []

    def run_pass(src, dst, *args, **options):
        calls.append(type(src[0]))
        reference.run_pass(
            [t.as_subclass(torch.Tensor) for t in src], [t.as_subclass(torch.Tensor) for t in dst], *args, **options
        )

    monkeypatch.setattr(cuda, "_triton", lambda: SimpleNamespace(__name__="triton", run_pass=run_pass))
    monkeypatch.setattr(cuda, "check", lambda device: RIGHT)
    weights, streams, coeffs, counters = (
        x.as_subclass(OnGPU) for x in (torch.zeros(5), torch.tensor([1]), torch.ones(1, 1), torch.zeros(2).long())
    )
    ops._update_([weights], [], [0], [], streams, coeffs, seed=1, distribution="rademacher", counters=counters)
    assert calls == [OnGPU] and weights.as_subclass(torch.Tensor).abs().eq(1).all()
    assert cuda.chosen() == {"cuda:0": "triton"}


def test_another_value_of_the_variable_is_an_error_that_names_the_choices():
    for value in ("native", "cuda"):
        done = python("import zo_core", ZO_CORE_BACKEND=value)
        assert "expected triton (CUDA tensors" in done.stderr and f"got '{value}'" in done.stderr


# ---- the check ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """An empty cache folder of zo_core, and one of Triton that has compiled forms."""
    pytest.importorskip("triton", reason="what Triton has compiled is looked up through it")
    (tmp_path / "triton" / "form").mkdir(parents=True)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("ZO_CORE_CACHE", str(tmp_path / "zo"))
    return tmp_path


def test_what_was_right_is_remembered_for_later_processes_and_said_once(folders, capfd):
    first = cuda.check(CPU)
    said = capfd.readouterr().err
    assert not first.remembered and first.seconds > 0 and said.count("\n") == 1 and str(folders / "triton") in said
    (file,) = (folders / "zo" / "checked").iterdir()
    assert json.loads(file.read_text()) == first.facts and {"GPU", "driver", "torch", "triton", "zo_core"} <= set(
        first.facts
    )
    second = cuda.check(CPU)
    assert second.remembered and not second.wrong and capfd.readouterr().err == ""
    assert not cuda.check(CPU, again=True).remembered


@pytest.mark.parametrize("fact", ["GPU", "capability", "driver", "CUDA", "torch", "zo_core", "triton", "kernels"])
def test_another_gpu_driver_or_version_is_checked_anew(folders, monkeypatch, fact):
    cuda.check(CPU)
    if fact == "kernels":
        monkeypatch.setattr(cuda, "_sources", lambda: "others")
    elif fact == "triton":
        monkeypatch.setattr(cuda, "_triton", lambda: SimpleNamespace(**{**vars(TRITON), "VERSION": "3.10.0"}))
    else:
        facts = cuda._facts(CPU)
        monkeypatch.setattr(cuda, "_facts", lambda device: facts | {fact: "another"})
    assert not cuda.check(CPU).remembered and cuda.check(CPU).remembered


def test_a_cache_that_is_damaged_or_read_only_or_empty_costs_a_check_and_no_error(folders, monkeypatch):
    cuda.check(CPU)
    (file,) = (folders / "zo" / "checked").iterdir()
    file.write_text("{")
    assert not cuda.check(CPU).remembered and cuda.check(CPU).remembered
    (folders / "triton" / "form").rmdir()
    assert not cuda.check(CPU).remembered, "compiled forms are gone: the next step would wait for them without a word"
    (folders / "triton" / "form").mkdir()
    (folders / "file").touch()
    monkeypatch.setenv("ZO_CORE_CACHE", str(folders / "file"))  # nothing can be written below a file, by nobody
    assert not cuda.check(CPU).remembered and not cuda.check(CPU).wrong


def test_processes_that_remember_at_once_leave_a_whole_file(folders):
    facts = {"GPU": "x" * 10000}
    file = cuda._file(facts)
    threads = [threading.Thread(target=cuda._remember, args=(file, facts)) for _ in range(20)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [json.loads(f.read_text()) for f in file.parent.iterdir()] == [facts]


def faulty(**changes):
    return lambda: SimpleNamespace(**{**vars(TRITON), **changes})


def test_wrong_kernels_warn_once_of_what_differed_and_are_not_remembered(folders, monkeypatch):
    def philox_(words, **key):
        reference.philox_(words, **key)
        words[0, 0] ^= 1

    monkeypatch.setattr(cuda, "_triton", faulty(philox_=philox_))
    with pytest.warns(
        UserWarning, match="Philox words: words: 1 of 1200 differ, the first at 0: expected .* got .*report"
    ) as w:
        assert cuda.backend_for(CPU) is cuda.backend_for(CPU) is reference
    assert len(w) == 1 and "ZO_CORE_BACKEND=reference" in str(w[0].message) and "torch 2" in str(w[0].message)
    assert not (folders / "zo").exists() and cuda.chosen() == {"cpu": "reference"}


def test_what_does_not_compile_is_said_once_for_all_answers(folders, monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(cuda, "_triton", faulty(run_pass=fails, run_rows=fails, philox_=fails))
    with pytest.warns(UserWarning, match="slice.*: RuntimeError: Failed to find C compiler") as w:
        cuda.backend_for(CPU)
    assert str(w[0].message).count("Failed") == 1


def test_a_cache_folder_that_triton_cannot_write_is_named(folders, monkeypatch):
    def fails(*args, **options):
        raise PermissionError(13, "Permission denied", "/home/me/.triton")

    monkeypatch.setattr(cuda, "_triton", faulty(run_pass=fails))
    with pytest.warns(UserWarning, match="TRITON_CACHE_DIR to a folder that can be written") as w:
        cuda.backend_for(CPU)
    assert "report" not in str(w[0].message)


def test_memory_that_runs_out_is_not_a_verdict(folders, monkeypatch):
    def fails(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cuda, "_triton", faulty(run_pass=fails))
    with pytest.raises(torch.OutOfMemoryError):
        cuda.backend_for(CPU)
    assert cuda.chosen() == {}


def test_no_triton_and_an_old_one_are_named_with_the_range_that_serves(monkeypatch):
    def absent():
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(cuda, "_triton", absent)
    with pytest.warns(UserWarning, match="triton is not installed: pip install 'triton>=3.6'") as w:
        assert cuda.backend_for(CPU) is reference
    assert "report" not in str(w[0].message)
    pytest.importorskip("triton")
    code = "import triton; triton.__version__ = '3.5.1'; import torch; from zo_core.bindings import cuda; "
    said = python(code + "print(cuda.check(torch.device('cpu')))").stdout
    assert "triton: expected version 3.6 or newer, got 3.5.1" in said
    (wanted,) = (x for x in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
                 if x.startswith("triton"))  # fmt: skip
    from zo_core.kernels.triton import OLDEST

    assert wanted.startswith("triton>=" + ".".join(map(str, OLDEST)))


def test_the_first_pass_may_not_be_inside_a_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(cuda, "check", lambda device: RIGHT)
    with pytest.raises(RuntimeError, match="before capturing"):
        ops.backend_for(GPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert ops.backend_for(GPU) is TRITON
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert ops.backend_for(GPU) is TRITON


def test_a_context_that_the_kernels_took_with_them_is_an_error_that_says_what_to_do(folders, monkeypatch):
    monkeypatch.setattr(cuda, "_facts", lambda device: {"GPU": "H100"})
    monkeypatch.setattr(selfcheck, "run", lambda backend, device: {"slice": "CUDA error: misaligned address"})
    if torch.cuda.is_available():
        pytest.skip("here the context lives")
    with pytest.raises(RuntimeError, match="misaligned address.*ZO_CORE_BACKEND=reference"):
        cuda.check(GPU)


def test_doctor_shows_the_check_and_the_compiled_forms(folders, monkeypatch):
    from zo_core.integrations import report

    (folders / "triton" / "form" / "pass_kernel.json").touch()
    monkeypatch.setattr(cuda, "check", lambda device: RIGHT)
    state, what, found, _ = report._kernels(GPU)
    assert state == "ok" and what == "kernels on cuda:0" and f"1 compiled forms in {folders / 'triton'}" in found
    monkeypatch.setattr(cuda, "check", lambda device: WRONG)
    state, _, found, advice = report._kernels(GPU)
    assert state == "slow" and "wrong" in found and "slice: 3 of 4 differ" in advice
    monkeypatch.setattr(native, "CHOICE", "reference")
    assert "unset it" in report._kernels(GPU)[3]


def test_a_model_on_several_devices_is_refused_by_name():
    first, second = torch.zeros(2), torch.zeros(2, device="meta")
    ops.require_one_device(["a", "b"], [first, first])
    with pytest.raises(ValueError, match="a on cpu, c on meta: load the model without device_map"):
        ops.require_one_device(["a", "b", "c"], [first, first, second])
    with pytest.raises(ValueError, match="on one device, got a on cpu, c on meta"):
        weights.space_of(["a", "b", "c"], [first, first, second], {})


@pytest.fixture
def slow(monkeypatch):
    """A kernel whose launch takes, by ``slow.until``, until that is set; and launches that no process has made yet."""
    launch = pytest.importorskip("zo_core.kernels.triton.launch", reason="triton is not installed")

    class Slow:
        __name__, until = "slow_kernel", threading.Event()

        def __getitem__(self, grid):
            return lambda **arguments: self.until.wait(60) and None  # as the interpreter, it gives no compiled form

    monkeypatch.setitem(launch.KERNELS, "slow_kernel", launch.Kernel(Slow(), 1, list, ("n", "FORM"), ("FORM",)))
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0)))
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "_announced", False)
    monkeypatch.setattr(launch, "PATIENCE", 0.0)
    said = []
    monkeypatch.setattr(launch, "announce", lambda what: said.append(what) or Slow.until.set())
    return SimpleNamespace(
        said=said, until=Slow.until, launch=launch,
        start=lambda form: launch.launch(launch.KERNELS["slow_kernel"].function, 1, n=3, FORM=form),
    )  # fmt: skip


def test_a_form_that_compiles_after_the_check_is_announced_once_a_process(slow):
    """The launch goes on when the line has been written, and would otherwise wait for a minute."""
    slow.start("first")
    assert slow.said == ["compiling kernels that this process needs"] and slow.until.is_set()
    slow.start("second")
    assert len(slow.said) == 1


def test_a_form_that_is_loaded_or_was_launched_or_announced_needs_no_line(slow, monkeypatch):
    slow.until.set()
    monkeypatch.setattr(slow.launch, "PATIENCE", 60.0)
    slow.start("kept on the disk")
    timers = [t for t in threading.enumerate() if isinstance(t, threading.Timer)]
    assert all(t.finished.is_set() for t in timers) and not slow.said
    monkeypatch.setattr(threading, "Timer", None)  # which no launch from here on may start
    slow.start("kept on the disk")
    with slow.launch.announced():
        slow.start("of the check")
    assert not slow.said


# ---- what starts no GPU ---------------------------------------------------------------------------------------------


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("ZO_CORE_BACKEND", "TRITON_INTERPRET")} | environment
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False, cwd=ROOT)


def test_importing_and_training_on_the_cpu_touch_no_gpu_so_that_a_child_may_use_it():
    code = """
import os, sys, torch
started = []
torch.cuda._lazy_init = lambda: started.append(1)
import zo_core
print("triton" in sys.modules)
w = torch.nn.Parameter(torch.ones(4))
zo_core.MeZO([w], lr=0.1).step(lambda: w.square().sum())
zo_core.backend_info()
print("zo_core.kernels.triton" in sys.modules, torch.cuda.is_initialized(), len(started), flush=True)
if (child := os.fork()) == 0:
    print(torch.cuda._is_in_bad_fork(), flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""
    assert python(code).stdout.split() == ["False", "False", "False", "0", "False"]


def test_launches_are_on_the_device_of_the_tensors(monkeypatch):
    pytest.importorskip("triton")
    from zo_core.kernels.triton import launch

    entered = []
    monkeypatch.setattr(torch.cuda, "device", entered.append)
    launch.on(torch.device("cuda", 1))
    launch.on(CPU)
    assert entered == [torch.device("cuda", 1)]
