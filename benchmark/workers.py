"""Processes that share a job's own work, one thread each: sampling, grading, R².

They are forked from a process that imports torch and transformers while the job does something else, so that
none of them takes seconds to start, and they end with the job, however it ends.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor

import torch


def start(count: int) -> ProcessPoolExecutor:
    """So many workers; what they are to do is a function of a module, with arguments that can be pickled."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmark.pipeline", "transformers.models.llama.modeling_llama"])
    multiprocessing.forkserver.ensure_running()
    return ProcessPoolExecutor(count, context, begin)


def begin() -> None:
    """What a worker does first."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, lambda *_: os._exit(1))  # nothing to save: files are written whole or not
    threading.Thread(target=end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def end_with(job) -> None:
    job.join()
    os._exit(1)
