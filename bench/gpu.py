"""The GPU acceptance program: ``python -m bench.gpu [--json FILE]``, one command, at most 8 minutes on one GPU.

Needs torch, triton, transformers, numpy and this checkout; no network, no native build. First a correctness gate
(every op against the reference, launch shapes, CUDA graphs), in several processes, as most of it is compiling: no
figure is taken on a red one. Then passes against device-to-device copies, whole steps against published MeZO, and steps of many
probes by the grouped engine against the shadow engine. One JSON, and a short table last.

    --smoke    the gate and the bookkeeping in Triton's interpreter, at tiny sizes, without a GPU; its times mean nothing
    --report F [F ...]   write a Markdown page from JSON files; nothing is run

Exit codes: 0 all well, 1 the gate is red, 3 no GPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count, pairwise, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

RED, NO_GPU = 1, 3
ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ((16, 32), (16, 64), (4, 256), (16, 256))  # batch x length of the whole steps
ENGINES = ("shadow", "inplace")
PARTS = ("passes", "steps", "probes")
STEP_MODELS = ("OPT-1.3B", "Llama-3-8B", "OPT-13B")
PROBES = ((8, 1, 32), (8, 4, 64), (8, 16, 64), (32, 1, 32), (32, 4, 64))  # probes, batch and length
PROBE_MODELS = STEP_MODELS[:2]


def say(text: str) -> None:
    """One line, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Bench:
    """Where and how large, the clock, and what came out."""

    def __init__(self, smoke: bool, minutes: float, every: int | None = None) -> None:
        self.every = every or (
            9 if smoke else 1
        )  # of so many cases of a pass the gate takes one; of encodings fewer from 20 on
        self.smoke, self.device = smoke, "cpu" if smoke else "cuda"
        self.deadline = time.monotonic() + 60 * minutes
        self.result: dict[str, Any] = {
            "smoke": smoke,
            "gate": [],
            "passes": [],
            "steps": [],
            "probes": [],
            "skipped": [],
        }

    def has_time(self, what: str, seconds: float) -> bool:
        """Whether so many seconds are left; what is left out is on record."""
        if self.smoke or time.monotonic() + seconds < self.deadline:
            return True
        self.result["skipped"].append(what)
        say(f"  left out, no time: {what}")
        return False

    def is_green(self) -> bool:
        """Whether no check of the gate has failed; says how many did."""
        red = sum(bool(g["error"]) for g in self.result["gate"])
        say(f"gate: {len(self.result['gate'])} checks, {red} red")
        return not red

    def wait(self) -> None:
        """Until the device is done."""
        import torch

        if not self.smoke:
            torch.cuda.synchronize()

    def peak(self, work: Callable[[], object]) -> int:
        """Bytes of the GPU's memory that a call has in use at most."""
        import torch

        if self.smoke:
            work()
            return 1
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def time(self, work: Callable[[], object], seconds: float = 0.3, least: int = 3) -> dict[str, float]:
        """Milliseconds of one call: median and 20th and 80th percentile, after two calls that are not counted."""
        import torch

        if self.smoke:
            begin = time.perf_counter()
            work()
            times = [1e3 * (time.perf_counter() - begin)]
        else:
            work()
            self.wait()
            begin = time.perf_counter()
            work()
            self.wait()
            n = max(least, min(200, int(seconds / (time.perf_counter() - begin))))
            marks: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]  # type: ignore[no-untyped-call]
            for mark in marks[:-1]:  # the host runs ahead of the GPU, where it can, as in training
                mark.record()
                work()
            marks[-1].record()
            self.wait()
            times = [a.elapsed_time(b) for a, b in pairwise(marks)]
        times.sort()
        return {"ms": statistics.median(times), "p20": times[len(times) // 5], "p80": times[len(times) * 4 // 5],
                "n": len(times)}  # fmt: skip


def machine() -> dict[str, Any]:
    """GPU, driver and versions."""
    import numpy
    import torch
    import transformers
    import triton

    versions = {m.__name__: m.__version__ for m in (torch, triton, transformers, numpy)}
    found: dict[str, Any] = {"versions": versions, "python": sys.version.split()[0], "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": p.name,
            "sms": p.multi_processor_count,
            "memory": p.total_memory,
            "capability": f"{p.major}.{p.minor}",
        }
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit",
            "--format=csv,noheader",
        ]
        try:
            found["smi"] = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
        except OSError as error:
            found["smi"] = str(error)
    return found


# ---- 1: the gate --------------------------------------------------------------------------------------------------


def gate(bench: Bench, part: tuple[int, int] = (0, 1)) -> bool:
    """Every op against the reference, and determinism. Failures are recorded; true if there is none.

    ``part``: (i, n), only each n-th check, from number i on.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    import cases
    import torch
    from zo_core.kernels import reference, selfcheck
    from zo_core.kernels import triton as backend
    from zo_core.kernels.triton import passes, table

    d = bench.device
    noise = 1e-5 if bench.smoke else 1e-3

    numbers = count()

    def check(name: str, work: Callable[[], object]) -> None:
        if next(numbers) % part[1] != part[0]:
            return
        try:
            work()
            error = ""
        except Exception as e:  # recorded, with what it was: the gate reports all of it
            error = f"{type(e).__name__}: {e}"[:500]
            say(f"  RED {name}: {error}")
        bench.result["gate"].append({"name": name, "error": error})

    def call(tensors: list[Any], distribution: str, k: int, **options: Any) -> None:
        coeffs = torch.linspace(0.01, -0.02, k, device=d)[:, None].expand(k, len(tensors)).contiguous()
        backend.run_pass(
            tensors, tensors, [], list(range(len(tensors))), options.pop("offsets", []), torch.arange(k, device=d), coeffs,
            seed=cases.SEED, distribution=distribution,
            counters=options.pop("counters", torch.zeros(1 + len(tensors), dtype=torch.int64, device=d)), **options,
        )  # fmt: skip

    for name, answer in selfcheck.ANSWERS.items():  # what decides on a user's card which backend is taken
        check(f"answer {name}", partial(answer, backend, torch.device(d)))
    for case in cases.CASES[:: bench.every]:
        check(f"pass {case}", partial(cases.check, case, backend, noise, d))

    n = 5000 if bench.smoke else 3_000_017

    def bounds(distribution: str) -> None:
        at = torch.arange(n, device=d)
        out = torch.zeros(n, device=d)
        coeffs, streams = torch.ones(1, 1, device=d), torch.tensor([5], device=d)
        backend.run_pass([out], [out], [], [3], [], streams, coeffs, seed=cases.SEED, distribution=distribution,
                         counters=torch.zeros(2, dtype=torch.int64, device=d))  # fmt: skip
        exact = reference.DISTRIBUTIONS[distribution](at, tensor_id=3, stream=5, seed=cases.SEED)
        error = out.double() - exact
        rms, largest = float(error.square().mean().sqrt()), float(error.abs().max())
        bench.result[f"{distribution} error"] = {"rms": rms, "max": largest, "n": n}
        assert (rms <= 1e-6 and largest <= 1e-3) if distribution == "gaussian" else largest == 0, (rms, largest)

    def many_streams(k: int) -> None:
        out = torch.zeros(n, device=d)
        call([out], "rademacher", k)
        at, expected = torch.arange(n, device=d), torch.zeros(n, device=d, dtype=torch.float64)
        for i, c in enumerate(torch.linspace(0.01, -0.02, k).tolist()):
            expected += c * reference.rademacher(at, tensor_id=0, stream=i, seed=cases.SEED)
        error = float((out.double() - expected).abs().max())
        assert error <= 2.0**-22 * 0.02 * k, f"off by {error:g}"

    def launch_shapes(distribution: str, k: int) -> None:
        outs = []
        tiles_of = table.tiles_of
        try:
            for n_tiles in (0, 1, 7):
                if n_tiles:
                    table.tiles_of = lambda form, n_tiles=n_tiles: n_tiles
                passes._prepared.clear()
                outs.append(torch.zeros(n, device=d))
                call([outs[-1]], distribution, k)
        finally:
            table.tiles_of = tiles_of
            passes._prepared.clear()
        assert all(torch.equal(outs[0], o) for o in outs[1:]), "not the same whatever the launch"
        if k == 1:
            part = torch.zeros(n - 1001, device=d)
            call([part], distribution, k, offsets=[1001])
            assert torch.equal(part, outs[0][1001:]), "not the same whatever the slice"

    def graph() -> None:
        stale = [torch.zeros(m, device=d, dtype=torch.bfloat16) for m in (n, 3, 1024)]
        fresh = [t.clone() for t in stale]
        stale += [torch.zeros_like(t, dtype=torch.int8) for t in stale]  # their residuals
        fresh += [t.clone() for t in stale[3:]]
        counters, update = torch.zeros(4, dtype=torch.int64, device=d), torch.tensor([4], device=d)
        streams, coeffs = torch.tensor([1], device=d), torch.full((1, 3), 0.01, device=d)

        def work(tensors: list[Any]) -> None:
            backend.run_pass(tensors[:3], tensors[:3], [], [0, 1, 2], [], streams, coeffs, seed=1, distribution="gaussian",
                             counters=counters, update=update, residuals=tensors[3:])  # fmt: skip

        work(stale)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            work(stale)
        for t in stale:
            t.zero_()
        for stream in (7, 8):  # numbers and coefficients are read when the graph runs
            streams.fill_(stream)
            coeffs.mul_(2)
            captured.replay()
            work(fresh)
        assert all(torch.equal(a, b) for a, b in zip(stale, fresh, strict=True)), "a replayed graph differs"

    def rows(bits: int) -> None:
        src = torch.randn(50, 4096 if not bench.smoke else 130, device=d).bfloat16()
        rest = (
            torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), src.shape, device=d).to(getattr(torch, f"int{bits}"))
            if bits
            else None
        )
        names = torch.tensor([3, 49, 0, 3], device=d)
        dst = src[names].clone()
        key = {
            "seed": 5,
            "distribution": "gaussian",
            "counters": torch.zeros(2, dtype=torch.int64, device=d),
            "residual": rest,
        }
        args = 7, 0, torch.tensor([2], device=d), torch.full((1, 1), 0.1, device=d)
        backend.run_rows(src, names, dst, *args, **key)
        expected = torch.empty_like(dst)
        reference.run_rows(src, names, expected, *args, **key)
        assert ((dst - expected).float().abs() <= 2.0**-7 * expected.float().abs() + 1e-6).all()
        assert (dst != expected).float().mean() <= 0.02

    def encoding(dtype: Any, bits: int, update: bool) -> None:
        """Every 16-bit weight with residuals of all kinds, also those that no pass makes, and values of all magnitudes."""
        residual = getattr(torch, f"int{bits}")
        ends = [-(1 << (bits - 1)), -1, 0, 1, (1 << (bits - 1)) - 1]
        weights = torch.arange(-(1 << 15), 1 << 15, device=d).to(torch.int16).view(dtype).repeat(len(ends))
        rests = torch.tensor(ends, device=d).to(residual).repeat_interleave(1 << 16)
        streams, counters = torch.empty(0, dtype=torch.int64, device=d), torch.zeros(2, dtype=torch.int64, device=d)
        options: dict[str, Any] = {"update": torch.tensor([3], device=d)} if update else {}

        def of(module: Any, into: Any, decay: float) -> list[Any]:
            w, r, c = weights.clone(), rests.clone(), counters.clone()
            dst = w if into is None else torch.empty_like(w, dtype=into)
            module.run_pass([w], [dst], [], [1], [], streams, streams.float()[:, None], seed=9, distribution="gaussian",
                            counters=c, residuals=[r], decay=torch.full((1,), decay, device=d), **options)  # fmt: skip
            return [dst.where(~dst.isnan(), 1.5), dst.isnan(), r, c]

        for into, decay in ((torch.float32, 0.0), (dtype, 0.0), (None, 0.5), (None, 1e-30)):
            got, expected = of(backend, into, decay), of(reference, into, decay)
            assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True)), f"into {into}, decay {decay}"

    def padded() -> None:
        """A step on prompts of several lengths: every point in one forward, and the losses that the shadow engine has."""
        from bench.gpu_models import batch, build
        from zo_core import FZOO

        losses = list[Any]()
        for engine in ("shadow", "grouped"):
            model: Any = build("Llama-3-8B", d, tiny=True).float()
            ids = batch(model, 3, 8)
            mask = torch.ones_like(ids)
            mask[0, :5] = mask[2, :2] = 0

            def loss(model: Any = model, ids: Any = ids, mask: Any = mask) -> Any:
                with torch.no_grad():
                    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                    return logits[:, -1].log_softmax(-1)[:, 3].mean()

            opt = FZOO(model, lr=1e-2, probes=8, seed=1, engine=engine, distribution="factored")
            losses.append(torch.tensor([float(opt.step(loss)) for _ in range(3)]))
            assert opt.fallback is None, opt.fallback
        assert torch.allclose(losses[0], losses[1], rtol=1e-4), losses

    def huge() -> None:
        m = 2**31 + 4099
        out = torch.zeros(m, device=d, dtype=torch.bfloat16)
        call([out], "rademacher", 1)
        end = torch.arange(m - 300, m, device=d)
        exact = 0.01 * reference.rademacher(end, tensor_id=0, stream=0, seed=cases.SEED)
        assert torch.equal(out[-300:], exact.float().bfloat16()), "the end of a tensor of more than 2^31 elements"

    for distribution in ("gaussian", "rademacher"):
        check(f"bounds {distribution}", partial(bounds, distribution))
        for k in (1, 3):
            check(f"launch shapes {distribution} K={k}", partial(launch_shapes, distribution, k))
    for k in (5, 8, 40) if bench.smoke else (5, 8, 13, 40, 160, 200):
        check(f"sums K={k}", partial(many_streams, k))
    for bits in (0, 8, 16):
        check(f"rows, residual of {bits} bits", partial(rows, bits))
    for dtype, bits, update in [
        (t, b, u) for t in (torch.bfloat16, torch.float16) for b in (8, 16) for u in (False, True)
    ][:: 1 + bench.every // 20]:
        check(f"encoding {dtype} + {bits} bits{' stochastic' * update}", partial(encoding, dtype, bits, update))
    if not bench.smoke:
        check("padded prompts", padded)
        check("graph", graph)
        check("2^31 elements", huge)
        torch.cuda.empty_cache()
    return bench.is_green()


def gate_in_parts(bench: Bench, jobs: int) -> bool:
    """The gate in so many processes, which leave what they compile in Triton's cache folder; true if all of it is green."""
    with TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.json" for i in range(jobs)]
        commands = [
            [sys.executable, "-m", "bench.gpu", "--part", f"{i}/{jobs}", "--json", str(f)] for i, f in enumerate(files)
        ]
        running = [subprocess.Popen(c, cwd=ROOT, stdout=subprocess.DEVNULL) for c in commands]
        for i, (process, file) in enumerate(zip(running, files, strict=True)):
            code = process.wait()
            found = json.loads(file.read_text()) if file.exists() else {}
            found.setdefault("gate", [{"name": f"part {i}", "error": f"its process ended with {code}"}])
            bench.result["gate"] += found["gate"]
            bench.result |= {name: x for name, x in found.items() if name.endswith(" error")}
    for g in bench.result["gate"]:
        if g["error"]:
            say(f"  RED {g['name']}: {g['error']}")
    return bench.is_green()


# ---- 2: passes ----------------------------------------------------------------------------------------------------


def passes_against_copy(bench: Bench) -> None:
    """Bandwidth of each pass over that of a copy, for one large tensor and for the tensor lists of models."""
    import torch
    from zo_core.kernels import triton as backend
    from zo_core.kernels.triton.naive import naive_add_noise_

    from bench.gpu_models import NAMES, shapes

    d = bench.device
    update = torch.tensor([1], device=d)

    counts = torch.zeros(1 + max(map(len, [shapes(m, bench.smoke) for m in NAMES])), dtype=torch.int64, device=d)

    def run(weights: list[Any], distribution: str, k: int, dst: list[Any] | None = None, **options: Any) -> None:
        hessians = options.pop("hessians", [])
        streams = options.pop("streams")
        backend.run_pass(weights, dst or weights, hessians, list(range(len(weights))), [], streams, options.pop("coeffs"),
                         seed=1, distribution=distribution, counters=counts[: 1 + len(weights)], **options)  # fmt: skip

    def add(model: str, form: str, dtype: str, moved: int, timed: dict[str, float], copy: float) -> None:
        gbps = moved / timed["ms"] / 1e6
        bench.result["passes"].append(
            {
                "model": model,
                "form": form,
                "dtype": dtype,
                "bytes": moved,
                "gbps": gbps,
                "of_copy": gbps / copy,
                **timed,
            }
        )
        say(f"  {model:<12} {form:<28} {dtype:<9} {timed['ms']:9.3f} ms {gbps:8.0f} GB/s {gbps / copy:6.1%} of copy")

    size = 1 << 14 if bench.smoke else 1 << 30
    a, b = (torch.empty(size, dtype=torch.uint8, device=d) for _ in range(2))
    timed = bench.time(partial(b.copy_, a), 0.5)
    copy = 2 * size / timed["ms"] / 1e6
    bench.result["copy_gbps"] = copy
    say(f"copy: {copy:.0f} GB/s")
    del a, b
    lists = {"one tensor": [(10, 500) if bench.smoke else (1 << 15, 1 << 14)]} | {
        m: shapes(m, bench.smoke) for m in NAMES
    }
    for model, sizes in list(lists.items())[: 2 if bench.smoke else None]:
        if not bench.has_time(f"passes {model}", 20):
            continue
        for dtype in (torch.bfloat16, torch.float32, torch.float16) if model == "one tensor" else (torch.bfloat16,):
            name = str(dtype).removeprefix("torch.")
            weights = [torch.zeros(s, device=d, dtype=dtype) for s in sizes]
            count, elements = len(weights), sum(w.numel() for w in weights)
            moved = 2 * elements * weights[0].element_size()

            def scalars(k: int, count: int = count) -> dict[str, Any]:
                coeffs = torch.full((k, count), 1e-6, device=d)
                return {"streams": torch.arange(k, device=d), "coeffs": coeffs}

            both = ("gaussian", "rademacher")
            forms: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
                ("gaussian", "gaussian", 1, {}),
                ("gaussian stochastic", "gaussian", 1, {"update": update}),
                ("rademacher", "rademacher", 1, {}),
                ("gaussian K=2 stochastic", "gaussian", 2, {"update": update}),
                ("rademacher K=8", "rademacher", 8, {}),
                ("rademacher K=8 stochastic", "rademacher", 8, {"update": update}),
                ("rademacher K=40", "rademacher", 40, {}),
                ("rademacher K=160", "rademacher", 160, {}),
                ("factored", "factored", 1, {}),
                ("factored stochastic", "factored", 1, {"update": update}),
                ("factored K=8", "factored", 8, {}),
                ("factored K=16", "factored", 16, {}),
            )
            if dtype is not torch.float32:
                forms += tuple((f"{z} + 8 stochastic", z, 1, {"residuals": torch.int8, "update": update}) for z in both)
                forms += tuple((f"{z} + 16", z, 1, {"residuals": torch.int16}) for z in both)
            for form, distribution, k, options in forms:
                if bench.smoke and (
                    k > 8 or (model != "one tensor" and form not in ("gaussian", "gaussian + 8 stochastic", "factored"))
                ):
                    continue
                if "stochastic" in form and dtype is torch.float32:
                    continue
                scalar = scalars(k)
                if rest := options.get("residuals"):
                    options["residuals"] = [torch.zeros_like(w, dtype=rest) for w in weights]
                work: Callable[[], object] = partial(run, weights, distribution, k, **scalar, **options)
                kept = sum(2 * r.nbytes for r in options.get("residuals", ()))
                add(model, form, name, moved + kept, bench.time(work), copy)
                options.clear()
                del work
            if model == "one tensor":
                hessians = [torch.ones(s, device=d) for s in sizes]
                scalar = scalars(1)
                work = partial(run, weights, "gaussian", 1, hessians=hessians, **scalar)
                add(model, "scaled by H", name, moved + 4 * elements, bench.time(work), copy)
                tiny, smooth = torch.full((1, count), 1e-6, device=d), torch.full((count,), 1e-6, device=d)
                more: dict[str, Any] = {
                    "restore": tiny,
                    "curvature": tiny,
                    "smoothing": smooth,
                    "hessian_min": 1e-8,
                    "hessian_max": 1e8,
                }
                work = partial(run, weights, "gaussian", 1, hessians=hessians, **scalar, **more)
                add(model, "H update", name, moved + 8 * elements, bench.time(work), copy)
                shadow = [torch.empty_like(w) for w in weights]
                work = partial(run, weights, "gaussian", 1, dst=shadow, **scalar)
                add(model, "into a shadow", name, moved, bench.time(work), copy)
                del hessians, shadow

            def published(weights: list[Any] = weights) -> None:
                from bench.published import perturb

                perturb(weights, 1, 1, 1e-3)

            add(model, "baseline torch.normal + add", name, moved, bench.time(published), copy)
            work = partial(naive_add_noise_, weights, 1, 1e-6)
            add(model, "baseline tl.randn", name, moved, bench.time(work), copy)
            del weights
    if not bench.smoke:
        torch.cuda.empty_cache()


# ---- 3: whole steps -----------------------------------------------------------------------------------------------


def whole_steps(bench: Bench) -> None:
    """Published MeZO and ours: forwards, what is outside them, total, and peak memory over inference."""
    import torch

    from bench import published
    from bench.gpu_models import batch, build
    from zo_core import MeZO, losses

    for name in STEP_MODELS[: 1 if bench.smoke else None]:
        if not bench.has_time(f"steps {name}", 45):
            continue
        model = build(name, bench.device, bench.smoke)
        params: list[Any] = list(model.parameters())
        bytes_of_weights = sum(p.numel() * p.element_size() for p in params)
        copies = 3 * 2 * bytes_of_weights / bench.result["copy_gbps"] / 1e6
        for size, length in SETTINGS[: 1 if bench.smoke else None]:
            if not bench.has_time(f"steps {name} {size}x{length}", 15):
                continue
            ids = batch(model, 2 if bench.smoke else size, 8 if bench.smoke else length)

            def loss(model: Any = model, ids: Any = ids) -> Any:
                with torch.inference_mode():
                    return losses.causal_lm_loss(model(input_ids=ids, use_cache=False).logits, ids)

            row: dict[str, Any] = {"model": name, "batch": size, "length": length, "weights": bytes_of_weights}
            inference = bench.peak(loss)
            forward = bench.time(loss, 0.5)["ms"]
            row |= {"forwards": 2 * forward, "three_copies": copies, "inference_bytes": inference}
            for engine in ENGINES:  # made anew each time: the published way replaces the tensors' memory
                step = partial(MeZO(model, lr=1e-7, eps=1e-3, seed=1, engine=engine, residual=None).step, loss)
                for _ in range(4):  # the first evaluations of the shadow engine look for reads that it does not see
                    step()
                ours = bench.time(step, 1.0)
                row[engine] = {**ours, "outside": ours["ms"] - 2 * forward, "of_bound": ours["ms"] / (2 * forward + copies),
                               "memory": bench.peak(step) / inference}  # fmt: skip
            published_step = partial(published.mezo_step, params, loss, 1, 1e-7, 1e-3)
            theirs = bench.time(published_step, 1.0)
            perturb = bench.time(partial(published.perturb, params, 1, 1, 1e-6))["ms"]
            update = bench.time(partial(published.update, params, 1, 1e-9, 1.0))["ms"]
            row["published"] = {**theirs, "outside": theirs["ms"] - 2 * forward, "perturb": perturb, "update": update,
                                "memory": bench.peak(published_step) / inference}  # fmt: skip
            del step, published_step, loss  # which keep the model
            bench.result["steps"].append(row)
            say(
                f"  {name:<11} {size:>3}x{length:<4} forwards {2 * forward:8.1f} ms  published {theirs['ms']:8.1f}"
                + "".join(
                    f"  {e} {row[e]['ms']:8.1f} ({theirs['ms'] / row[e]['ms']:.2f}x; {row[e]['of_bound']:.2f} of forwards + 3 copies)"
                    for e in ENGINES
                )
            )
        del model, params
        if not bench.smoke:
            torch.cuda.empty_cache()


# ---- 4: steps of many probes --------------------------------------------------------------------------------------


def many_probes(bench: Bench) -> None:
    """FZOO with factored probes: as many forwards as it has points, the shadow engine, the grouped engine; and their peak memory."""
    import torch

    from bench.gpu_models import batch, build
    from zo_core import FZOO, losses

    for name in PROBE_MODELS[: 1 if bench.smoke else None]:
        if not bench.has_time(f"probes {name}", 40):
            continue
        model = build(name, bench.device, bench.smoke)
        for probes, size, length in PROBES[: 1 if bench.smoke else None]:
            if not bench.has_time(f"probes {name} {probes} {size}x{length}", 12):
                continue
            ids = batch(model, size, 8 if bench.smoke else length)

            def loss(model: Any = model, ids: Any = ids) -> Any:
                with torch.no_grad():
                    return losses.causal_lm_loss(model(input_ids=ids, use_cache=False).logits, ids)

            forward = bench.time(loss, 0.3)["ms"]
            row: dict[str, Any] = {"model": name, "probes": probes, "batch": size, "length": length,
                                   "forwards": (1 + probes) * forward}  # fmt: skip
            for engine in ("shadow", "grouped"):
                opt = FZOO(model, lr=1e-9, probes=probes, seed=1, engine=engine, residual=None, distribution="factored")
                step = partial(opt.step, loss)
                row[engine] = bench.time(step, 0.8) | {"memory": bench.peak(step)}
                serving: Any = opt._engine
                if engine == "grouped":
                    row[engine] |= {"fallback": serving.fallback, "at_once": min(1 + probes, serving._at_once())}
                del opt, step, serving
            del loss  # which keeps the model
            bench.result["probes"].append(row)
            shadow, grouped = row["shadow"]["ms"], row["grouped"]["ms"]
            say(
                f"  {name:<11} {size:>3}x{length:<4} {probes:>3} probes  forwards {row['forwards']:8.1f} ms  shadow {shadow:8.1f}"
                f"  grouped {grouped:8.1f} ({shadow / grouped:.2f}x; {grouped / row['forwards']:.2f} of forwards)"
                + f"  {row['grouped']['at_once']} at once {row['grouped']['fallback'] or ''}"
            )
        del model
        if not bench.smoke:
            torch.cuda.empty_cache()


# ---- 5: what is left of it ----------------------------------------------------------------------------------------


def report(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown page from results."""
    lines = [
        "# GPU acceptance runs",
        "",
        "Made by `python -m bench.gpu --report`; the figures are those of the JSON files.",
        "",
    ]
    for r in results:
        m = r["machine"]
        lines += [f"## {m.get('gpu', 'no GPU: interpreter smoke run, its times mean nothing')}", ""]
        versions = ", ".join(f"{n} {v}" for n, v in m["versions"].items())
        red = [g for g in r["gate"] if g["error"]]
        lines += [f"{r['date']}; {versions}; driver, clocks, power: {m.get('smi', '-')}.", ""]
        lines += [f"The {part} are of {date}.\n" for part, date in r.get("dates", {}).items() if date != r["date"]]
        lines += [f"Gate: {len(r['gate'])} checks, {len(red)} red. Copy: {r.get('copy_gbps', 0):.0f} GB/s.", ""]
        lines += [f"- RED {g['name']}: {g['error']}" for g in red]
        for name in ("gaussian error", "rademacher error"):
            if e := r.get(name):
                lines += [f"- {name} against float64, {e['n']} elements: RMS {e['rms']:.2e}, maximum {e['max']:.2e}"]
        lines += ["", "| tensors | pass | dtype | ms | GB/s | of copy |", "|---|---|---|--:|--:|--:|"]
        lines += [
            f"| {p['model']} | {p['form']} | {p['dtype']} | {p['ms']:.3f} | {p['gbps']:.0f} | {p['of_copy']:.1%} |"
            for p in r["passes"]
        ]
        lines += ["", "| model | batch x length | engine | two forwards, ms | published, ms | ours, ms | faster "
                  "| of forwards + 3 copies | outside, published | outside, ours | memory, published | memory, ours |",
                  "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
        for s, engine in product(r["steps"], ENGINES):
            o, p = s[engine], s["published"]
            lines.append(
                f"| {s['model']} | {s['batch']}x{s['length']} | {engine} | {s['forwards']:.1f} | {p['ms']:.1f} | {o['ms']:.1f} "
                f"| {p['ms'] / o['ms']:.2f}x | {o['of_bound']:.2f} | {p['outside']:.1f} | {o['outside']:.1f} "
                f"| {p['memory']:.3f} | {o['memory']:.3f} |"
            )
        lines += ["", "| model | probes | batch x length | as many forwards, ms | shadow, ms | grouped, ms | faster | of forwards "
                  "| points at once | memory, GiB: shadow | grouped |", "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
        for s in r.get("probes", ()):
            o, p = s["grouped"], s["shadow"]
            lines.append(
                f"| {s['model']} | {s['probes']} | {s['batch']}x{s['length']} | {s['forwards']:.1f} | {p['ms']:.1f} | {o['ms']:.1f} "
                f"| {p['ms'] / o['ms']:.2f}x | {o['ms'] / s['forwards']:.2f} | {o['at_once']} | {p['memory'] / 2**30:.1f} "
                f"| {o['memory'] / 2**30:.1f} |"
            )
        if r["skipped"]:
            lines += ["", "Left out for time: " + ", ".join(r["skipped"]) + "."]
        lines.append("")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, write the JSON, print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="default: bench/results/gpu_<name>.json; with --smoke none")
    parser.add_argument("--minutes", type=float, default=8, help="what does not fit is left out and listed")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        help="after the gate; of the others the JSON keeps what it has",
    )
    parser.add_argument("--smoke", action="store_true", help="in the interpreter, tiny, no GPU")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 16), help="processes of the gate")
    parser.add_argument("--part", help="i/n: only a part of the gate, as each of its processes runs")
    parser.add_argument("--report", type=Path, nargs="+", metavar="JSON", help="write a page from these files")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu.md", help="of --report")
    args = parser.parse_args(argv)
    if args.report:
        args.out.write_text(report([json.loads(p.read_text()) for p in args.report]))
        say(f"wrote {args.out}")
        return 0
    begin, now = time.monotonic(), time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    if args.smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    import torch

    if not args.smoke and not torch.cuda.is_available():
        say("bench.gpu needs a CUDA GPU and found none; `--smoke` tries the program without one")
        return NO_GPU
    os.environ["ZO_CORE_BACKEND"] = "triton"  # before zo_core is imported
    if args.smoke:
        from zo_core.bindings import ops
        from zo_core.kernels import triton as backend

        ops.backend_for = lambda device: backend
    bench = Bench(args.smoke, args.minutes)
    bench.result |= {"machine": machine(), "date": now}
    name = str(bench.result["machine"].get("gpu", "smoke")).replace(" ", "_")
    path = args.json or (None if args.smoke else ROOT / "bench" / "results" / f"gpu_{name}.json")
    known = json.loads(path.read_text()) if path and path.exists() and set(args.only) < set(PARTS) else {}
    bench.result["dates"] = {
        p: now if p in args.only else known.get("dates", {}).get(p, known.get("date")) for p in PARTS
    }
    bench.result |= {p: known.get(p, []) for p in PARTS if p not in args.only}
    bench.result["copy_gbps"] = known.get("copy_gbps", 0)
    if "steps" in args.only and "passes" not in args.only and not bench.result["copy_gbps"]:
        parser.error(f"--only steps: {path} has no copy's bandwidth, which steps are held against: add passes")
    part, parts = map(int, (args.part or "0/1").split("/"))
    if args.part or args.smoke or args.jobs == 1:
        well = gate(bench, (part, parts))
    else:
        well = gate_in_parts(bench, args.jobs)
    if well and not args.part:
        for measure, part_name in zip((passes_against_copy, whole_steps, many_probes), PARTS, strict=True):
            if part_name in args.only:
                measure(bench)
    bench.result["seconds"] = time.monotonic() - begin
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(bench.result, indent=1) + "\n")
        say(f"wrote {path}")
    if not args.part:
        say(report([bench.result]))
    return 0 if well else RED


if __name__ == "__main__":
    sys.exit(main())
