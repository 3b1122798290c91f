"""Runs functions in forked processes of one parent that has imported all they need, so that a run of a second
takes a second and not ten: `forks` and `bare` of tiny.py. One JSON request a line in, one answer a line out."""

import contextlib
import importlib
import io
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import textwrap
import time
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OURS = ("pfppo_single", "rm_single", "sft_single", "benchmark", "tiny")
FILE_EVENTS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir")


def run_script(name: str, settings: dict) -> None:
    """All of a script's main."""
    script = importlib.import_module(name)
    script.main(script.Args(**settings))


def run_command(command: list[str]) -> None:
    """What `python FILE FLAGS` or `python -m MODULE FLAGS` does in ROOT, but that packages which are not ours may
    have been imported already."""
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]
    os.chdir(ROOT)
    as_module = command[0] == "-m"
    start = ROOT if as_module else (ROOT / command[0]).parent
    sys.path[:] = [str(start), *[path for path in sys.path if path and not is_ours(Path(path))]]
    sys.argv = command[as_module:]
    if as_module:
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")


def is_ours(path: Path) -> bool:
    """Whether an entry of sys.path is a folder of this repository, and not of an environment inside of it."""
    return path.resolve().is_relative_to(ROOT) and "site-packages" not in path.parts


def run_code(code: str) -> None:
    """What `python -c CODE` does in ROOT."""
    os.chdir(ROOT)
    exec(compile(textwrap.dedent(code), "<code>", "exec"), {"__name__": "__main__"})


def count_file_operations(folder: str, kill_at: int | None) -> list[int]:
    """Counts, in the list's only entry, what is opened, made, renamed and removed in the folder from now on;
    SIGKILL in place of operation number kill_at."""
    count = [0]

    def hook(event: str, arguments: tuple) -> None:
        if event in FILE_EVENTS and isinstance(arguments[0], str | os.PathLike):
            path = os.fspath(arguments[0])  # shutil.rmtree gives names relative to an open folder
            if path.startswith(folder) or (event in ("os.remove", "os.rmdir") and not os.path.isabs(path)):
                if count[0] == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                count[0] += 1

    sys.addaudithook(hook)
    return count


def child(request: dict, rank: int, port: int) -> None:
    """One process of a request; leaves its result in FOLDER.answer_RANK, beside what it printed."""
    log = os.open(request["folder"] + f".log_{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1), os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 1
    try:
        if request["processes"] > 1:
            ranks = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": request["processes"],
                "MASTER_PORT": port,
            }
            os.environ.update({name: str(value) for name, value in ranks.items()}, MASTER_ADDR="127.0.0.1")
        sys.path[:0] = request["path"]
        operations = count_file_operations(request["folder"], None if rank else request["kill_at"])
        function = getattr(importlib.import_module(request["module"]), request["function"])
        answer = {"result": function(*request["arguments"]), "operations": operations[0]}
        Path(request["folder"] + f".answer_{rank}").write_text(json.dumps(answer))
        code = 0
    except SystemExit as exit:
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
        code = int(exit.code is not None) if isinstance(exit.code, str | None) else exit.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def serve(request: dict) -> dict:
    """Forks, waits for all, or kills all after kill_after seconds or when one has died -> answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start, running, codes = time.monotonic(), {}, {}
    for rank in range(request["processes"]):
        pid = os.fork()
        if pid == 0:
            child(request, rank, port)
        running[pid] = rank
    while running:
        late = time.monotonic() - start > (request["kill_after"] or 600)
        for pid in list(running) if late or any(codes.values()) else ():
            os.kill(pid, signal.SIGKILL)  # not yet waited for, so the number is still its own
        pid, status = os.waitpid(-1, 0 if late or any(codes.values()) else os.WNOHANG)
        if pid in running:
            codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
        elif pid == 0:
            time.sleep(0.005)
    answers = [Path(request["folder"] + f".answer_{rank}") for rank in sorted(codes)]
    answers = [json.loads(path.read_text()) if path.is_file() else {} for path in answers]
    answer = {"codes": [codes[rank] for rank in sorted(codes)], "seconds": time.monotonic() - start}
    return answer | {
        "results": [x.get("result") for x in answers],
        "operations": answers[0].get("operations"),
    }


def warm_up() -> None:
    """Imports what a run imports, and fills the caches that transformers fills at the first model it loads."""
    for name in ("torch._dynamo", "torch.utils.tensorboard", "pfppo_single", "rm_single", "sft_single"):
        importlib.import_module(name)
    for name in ("torch.distributed.fsdp", "torch.distributed.checkpoint"):
        importlib.import_module(name)
    importlib.import_module("transformers.models.auto.tokenization_auto")
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config

    torch.set_num_threads(1)
    config = GPT2Config(n_layer=1, n_embd=4, n_head=1, vocab_size=4, bos_token_id=0, eos_token_id=0)
    bars = contextlib.redirect_stderr(io.StringIO())  # of progress
    with tempfile.TemporaryDirectory() as folder, bars:
        for auto_class in (AutoModelForCausalLM, AutoModelForSequenceClassification):
            auto_class.from_config(config).save_pretrained(folder)
            auto_class.from_pretrained(folder)


def answer_requests(requests, answers, prepare) -> None:
    """Prepares at the first request, and serves until `requests` ends, as it does when the process of the tests has
    gone."""
    for i, line in enumerate(requests):
        if i == 0:
            prepare()
        print(json.dumps(serve(json.loads(line))), file=answers, flush=True)


def fork_bare() -> tuple:
    """The server of a process that has imported nothing but what the scripts import at their top, and none of
    ours."""
    for name in ("torch", "accelerate"):
        importlib.import_module(name)
    return fork_here(lambda: None)


def fork_here(prepare=warm_up) -> tuple:
    """Forks the server from this process, which has imported what the runs need and has computed nothing yet
    -> its number, a file for requests, a file of answers."""
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: that of xdist only reads
        server = os.fork()
    if server:
        os.close(theirs_in), os.close(theirs_out)
        return server, os.fdopen(ours_out, "w"), os.fdopen(ours_in)
    try:
        os.close(ours_in), os.close(ours_out)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which end us
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", 1, closefd=False)
        os.environ.update(ENVIRONMENT)
        with os.fdopen(theirs_in) as requests, os.fdopen(theirs_out, "w") as answers:
            answer_requests(requests, answers, prepare)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "ACCELERATE_USE_CPU": "true"}
