"""Runs functions in forked processes of one parent that has imported all they need, so that a run of a second
takes a second and not ten. `forks` in conftest.py starts it: one JSON request a line in, one answer a line out."""

import importlib
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILE_EVENTS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir")


def run_script(name: str, settings: dict) -> None:
    """All of a script's main."""
    script = importlib.import_module(name)
    script.main(script.Args(**settings))


def run_command(name: str, flags: list[str]) -> None:
    """The script as `python NAME.py FLAGS` runs it."""
    sys.argv = [f"{name}.py", *flags]
    runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")


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
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config

    torch.set_num_threads(1)
    config = GPT2Config(n_layer=1, n_embd=4, n_head=1, vocab_size=4, bos_token_id=0, eos_token_id=0)
    with tempfile.TemporaryDirectory() as folder:
        for auto_class in (AutoModelForCausalLM, AutoModelForSequenceClassification):
            auto_class.from_config(config).save_pretrained(folder)
            auto_class.from_pretrained(folder)


if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    sys.path[:0] = [str(ROOT)]
    warm_up()
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), file=out, flush=True)
