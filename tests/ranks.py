"""Processes of one job on this machine, joined by gloo."""

import datetime
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback

import torch
from torch import distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")  # torch is imported once, and no thread of ours runs when it forks
_CONTEXT.set_forkserver_preload(
    [f"torch{x}" for x in ("", ".distributed.tensor", ".distributed.fsdp", ".distributed.checkpoint.state_dict")]
    + ["zo_core", "pytest"]
)


def _work(pipe, store, rank, ranks, job, args, options):
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=90)
        )
        pipe.send_bytes(pickle.dumps((job(*args, **options), "")))  # not send, which leaves tensors here
    except BaseException:
        pipe.send_bytes(pickle.dumps((None, traceback.format_exc())))
        raise
    finally:
        pipe.close()
        os._exit(0)  # groups of ranks that are gone would wait for them


def run(job, ranks, *args, seconds=180, **options):
    """What job(*args, **options) returned in each rank; None for one that was killed; AssertionError with a failing one's traceback."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = [_CONTEXT.Pipe(duplex=False) for _ in range(ranks)]
        processes = [
            _CONTEXT.Process(target=_work, args=(end, f"{folder}/store", rank, ranks, job, args, options), daemon=True)
            for rank, (_, end) in enumerate(pairs)
        ]
        try:
            for process, (_, end) in zip(processes, pairs, strict=True):
                process.start()
                end.close()
            found, until = [], time.monotonic() + seconds
            for rank, (pipe, _) in enumerate(pairs):
                assert pipe.poll(max(0, until - time.monotonic())), f"rank {rank} is still at work after {seconds} s"
                try:
                    found.append(pickle.loads(pipe.recv_bytes()))
                except EOFError:
                    found.append((None, ""))
        finally:
            for process in processes:
                process.kill()
                process.join()
        for rank, (_, error) in enumerate(found):
            assert not error, f"rank {rank}: {error}"
        return [result for result, _ in found]
