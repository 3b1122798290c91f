"""Files: rows in, checkpoints, what a folder may hold when a run starts. The functions are the same in all
three scripts (test_layout.py), so one script's are tested."""

import dataclasses
import errno
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, tracking
from accelerate.utils import LoggerType
from conftest import EOS, make_tokenizer, write_jsonl

import pfppo_single as pf
import rm_single as rm
import sft_single as sft

ANSWER = {"role": "assistant", "content": "yes"}
ARGS = dict(policy="p", reward="r", prompts="rows.jsonl")


# ---------------------------------------------------------------- rows


def test_a_line_of_jsonl_ends_at_a_newline_alone(tmp_path):
    # U+2028, U+2029 and U+0085 may stand unescaped in a JSON string
    text, file = "a\u2028b\u2029c\x85d", tmp_path / "rows.jsonl"
    file.write_text(f'{{"prompt": "{text}"}}\r\n\n{{"prompt": "e"}}', encoding="utf-8", newline="")
    assert pf.load_rows(str(file), "prompts") == [{"prompt": text}, {"prompt": "e"}]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("none.jsonl", None, "No such file"),
        ("rows.jsonl", "", "no rows"),
        ("rows.jsonl", '{"prompt": "a"}\n{"prompt"', "row 2: not JSON in UTF-8"),
        ("rows.jsonl", '{"prompt": "a"}\n\n3\n', "row 2: 3 is no object with columns"),
        ("rows.jsonl", '{"prompt": "a"}\n{"text": "b", "n": 1}\n', "row 2: no column prompt; it has n, text"),
        ("rows.jsonl", '{"prompt": null}\n', "row 1: no column prompt"),
        ("rows.json", "[]", "no rows"),
        ("rows.json", "{}", "no rows"),
        ("rows.json", "[", "not JSON"),
        ("none.parquet", None, "none.parquet"),
        ("none.csv", None, "none.csv"),
        ("folder", None, "folder"),
        ("no_such_name:train", None, "no_such_name"),
    ],
)
def test_rows_that_cannot_be_read_are_refused_with_file_and_row(tmp_path, monkeypatch, name, text, message):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match=f"^--prompts {name}.*{message}") as refusal:
        pf.load_rows(name, "prompts", ("prompt",))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "name, message", [("torn.csv", "torn.csv: .*EOF inside string"), ("no_train", "no_train.*train")]
)
def test_tables_that_cannot_be_read_are_refused_in_one_line(tmp_path, name, message):
    # whatever `datasets` raises: a broken file, a saved dictionary without the split that is asked for
    datasets = pytest.importorskip("datasets")
    (tmp_path / "torn.csv").write_text('a,b\n1,2,3,4\n5\n"')
    part = datasets.Dataset.from_list([{"prompt": "a"}])
    datasets.DatasetDict({"test": part}).save_to_disk(tmp_path / "no_train")
    with pytest.raises(SystemExit, match=f"^--prompts .*{message}") as refusal:
        pf.load_rows(str(tmp_path / name), "prompts")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "template, last",
    [
        ("{{ '<s>' + m['content'] }}", {"role": "user", "content": [{"type": "text", "text": "two"}]}),
        ("{% if loop.index0 > 1 %}{{ raise_exception('no') }}{% endif %}{{ m['content'] }}", ANSWER),
    ],
    ids=["a template that concatenates, and text in parts", "a strict template, and a prompt that it ends"],
)
def test_showing_the_first_row_stops_no_run(template, last):
    # what can be encoded can be shown; the hint at the stop token is left out where the template refuses
    tokenizer, prompt = make_tokenizer(), [{"role": "user", "content": "one"}, last]
    tokenizer.chat_template = "{% for m in messages %}" + template + "{% endfor %}"
    printed, ids = [], pf.encode_prompt(tokenizer, prompt)
    pf.show_first(
        SimpleNamespace(print=lambda *texts: printed.extend(texts)), tokenizer, prompt, ids, [], EOS
    )
    assert "first query: " in printed[0]


# ---------------------------------------------------------------- checkpoints


@pytest.fixture
def prepared():
    """An accelerator that holds one linear layer and its optimizer."""
    accelerator, layer = Accelerator(cpu=True), torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    return accelerator, *accelerator.prepare(layer, optimizer)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_checkpoints_are_ordered_by_number(prepared, tmp_path):
    # PITFALLS SYS-9: 1,000,000 comes after 999,999, as text it would come before
    accelerator, layer, optimizer = prepared
    for step in (999_999, 1_000_000):
        layer.weight.data.fill_(step)
        pf.save_checkpoint(accelerator, tmp_path / str(step), step, {"best": step / 2}, layer, optimizer)
    (tmp_path / "1000000/checkpoints/step_1000000").rename(tmp_path / "999999/checkpoints/step_1000000")
    layer.weight.data.fill_(0)
    state = pf.load_checkpoint(accelerator, tmp_path / "999999", layer, optimizer)
    assert state == {"step": 1_000_000, "best": 500_000} and (layer.weight == 1_000_000).all()


def test_a_new_checkpoint_replaces_the_older_one(prepared, tmp_path):
    # PITFALLS SYS-10: also where the number gets one digit more, and what a kill left behind goes
    accelerator, *_ = prepared
    pf.save_checkpoint(accelerator, tmp_path, 999_999, {})
    (tmp_path / "checkpoints/tmp").mkdir()
    pf.save_checkpoint(accelerator, tmp_path, 1_000_000, {})
    assert names(tmp_path) == ["step_1000000"]


def test_the_older_checkpoint_stays_until_the_new_one_is_whole(prepared, tmp_path, monkeypatch):
    # PITFALLS SYS-10
    accelerator, *_ = prepared
    pf.save_checkpoint(accelerator, tmp_path, 1, {"best": 1})
    before = (tmp_path / "checkpoints/step_000001/rank_0.pt").read_bytes()
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        pf.save_checkpoint(accelerator, tmp_path, 2, {"best": 2})
    assert names(tmp_path) == ["step_000001", "tmp"]
    assert (tmp_path / "checkpoints/step_000001/rank_0.pt").read_bytes() == before
    assert pf.load_checkpoint(accelerator, tmp_path) == {"best": 1, "step": 1}


def test_a_checkpoint_holds_tensors_and_no_code(prepared, tmp_path):
    # what a pickle runs when it is read, torch refuses to read
    accelerator, layer, optimizer = prepared
    pf.save_checkpoint(accelerator, tmp_path, 1, {}, layer, optimizer)
    saved, _ = torch.load(tmp_path / "checkpoints/step_000001/rank_0.pt", weights_only=True)
    assert torch.equal(saved["weight"], layer.weight)


def test_a_checkpoint_holds_the_scale_of_fp16(prepared, tmp_path, monkeypatch):
    # a resumed run would begin with the first scale, overflow and skip steps that the whole run takes
    accelerator, layer, optimizer = prepared
    monkeypatch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu", init_scale=2.0))
    accelerator.scaler.scale(layer.weight.sum()).backward()
    optimizer.step()
    pf.save_checkpoint(accelerator, tmp_path, 1, {}, layer, optimizer)
    monkeypatch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu", init_scale=8.0))
    pf.load_checkpoint(accelerator, tmp_path, layer, optimizer)
    assert accelerator.scaler.get_scale() == 2.0


def test_a_checkpoint_of_an_older_version_is_refused_in_one_line(prepared, tmp_path):
    # it held model.safetensors and optimizer.bin
    (tmp_path / "checkpoints/step_000002").mkdir(parents=True)
    with pytest.raises(SystemExit, match="^.*step_000002 is of another version; name a new --output_dir$"):
        pf.load_checkpoint(*prepared[:1], tmp_path, *prepared[1:])


def test_without_a_checkpoint_there_is_no_state(prepared, tmp_path):
    # PITFALLS SYS-10: one that was being written is none
    (tmp_path / "checkpoints/tmp").mkdir(parents=True)
    assert pf.load_checkpoint(prepared[0], tmp_path) is None


def test_a_text_is_replaced_as_a_whole(tmp_path, monkeypatch):
    # PITFALLS SYS-10
    file = tmp_path / "metrics.jsonl"
    pf.write_text(file, "old")
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        pf.write_text(file, "new")
    assert file.read_text() == "old"


# ---------------------------------------------------------------- the folder of a run


def open_run(folder: Path, **changes) -> Path:
    return pf.open_run(Accelerator(cpu=True), pf.Args(output_dir=str(folder), **{**ARGS, **changes}))


@pytest.mark.parametrize("prepare", ["nothing", "empty", "killed"])
def test_a_new_run_takes_a_new_or_empty_folder(tmp_path, prepare):
    # PITFALLS SYS-9: `killed`: while it wrote its first file, behind which it was to be renamed
    if prepare != "nothing":
        (tmp_path / "run").mkdir()
    if prepare == "killed":
        (tmp_path / "run/args.json.tmp").write_text('{"output_dir"')
    assert open_run(tmp_path / "run") == tmp_path / "run"
    assert json.loads((tmp_path / "run/args.json").read_text())["num_processes"] == 1


@pytest.mark.parametrize(
    "field, value",
    [
        ("micro_batch_size", 4),
        ("forward_batch_size", 4),
        ("generation_batch_size", 4),
        ("gradient_checkpointing", True),
        ("checkpoint_every", 4),
        ("log_with", "none"),
    ],
)
def test_memory_and_speed_may_change_when_a_run_goes_on(tmp_path, field, value):
    # what a run needs that has run out of memory
    open_run(tmp_path / "run")
    open_run(tmp_path / "run", **{field: value})
    assert json.loads((tmp_path / "run/args.json").read_text())[field] == value


def test_whatever_else_changes_makes_another_run(tmp_path):
    # the settings that differ are named, with both values
    open_run(tmp_path / "run")
    with pytest.raises(
        SystemExit, match=r"holds another run: seed \(1 there, 2 here\), lr \(5e-07 there, 0.1"
    ):
        open_run(tmp_path / "run", seed=2, lr=0.1)


def test_every_setting_is_compared(tmp_path):
    # none but those of memory and speed is forgotten
    open_run(tmp_path / "run")
    file = tmp_path / "run/args.json"
    settings = json.loads(file.read_text())
    free = {"micro_batch_size", "forward_batch_size", "generation_batch_size", "gradient_checkpointing"}
    fields = {field.name for field in dataclasses.fields(pf.Args)} | {"num_processes", "mixed_precision"}
    for name in fields - free - {"checkpoint_every", "log_with"}:
        file.write_text(json.dumps({**settings, name: "another"}))
        with pytest.raises(SystemExit, match=rf"holds another run: {name} \('another' there"):
            open_run(tmp_path / "run")


def test_another_precision_makes_another_run(tmp_path, monkeypatch):
    # half a run in bfloat16, half in float32, or fp16 without its scale; it is no setting of the script
    open_run(tmp_path / "run")
    monkeypatch.setattr(pf.Accelerator, "mixed_precision", "bf16")
    with pytest.raises(SystemExit, match=r"another run: mixed_precision \('no' there, 'bf16' here\)"):
        open_run(tmp_path / "run")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_a_model_that_was_trained_anew_makes_another_run(tmp_path, name):
    # SFT again in the same folder: a reward model that was trained on the old one is not "done"
    (tmp_path / "model").mkdir()
    for file, size in (("config.json", 2), (name, 3 * 2**20), ("README.md", 2)):
        (tmp_path / "model" / file).write_bytes(bytes(size))
    open_run(tmp_path / "run", policy=str(tmp_path / "model"))
    (tmp_path / "model/README.md").write_bytes(b"abc")  # says nothing of the model
    open_run(tmp_path / "run", policy=str(tmp_path / "model"))
    (tmp_path / "model" / name).write_bytes(bytes(3 * 2**20 - 1) + b"a")
    with pytest.raises(SystemExit, match="holds another run: sha256 of policy"):
        open_run(tmp_path / "run", policy=str(tmp_path / "model"))


def test_a_setting_of_any_length_is_no_file(tmp_path):
    # TEXT of module:function@TEXT; the system refuses to look for such a name
    assert open_run(tmp_path / "run", reward="rewards:f@" + "x" * 999) == tmp_path / "run"


def test_a_folder_that_cannot_be_made_or_locked_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        SystemExit, match="^--output_dir .*file/run: .*Not a directory.*; name another folder"
    ):
        open_run(tmp_path / "file/run")

    def lockf(*_):  # some network file systems have none
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(pf.fcntl, "lockf", lockf)
    with pytest.raises(SystemExit, match="^--output_dir .*run: .*No locks available; name another folder"):
        open_run(tmp_path / "run")


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(SystemExit, match=f"^--output_dir {tmp_path} is not empty and holds no run of this"):
        open_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_lines_behind_the_checkpoint_are_dropped(tmp_path):
    # PITFALLS SYS-9: they will be written again; one that was cut short goes too
    for name in ("metrics.jsonl", "samples.jsonl"):
        write_jsonl(tmp_path / name, [{"step": step, "x": 1.5} for step in range(4)])
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 1, "x"')
    track(tmp_path, 2, tracker="none")
    for name, count in (
        ("metrics.jsonl", 2),
        ("samples.jsonl", 3),
    ):  # the checkpoint's metrics are logged again
        lines = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert lines == [{"step": step, "x": 1.5} for step in range(count)]


def test_tensorboard_drops_what_is_behind_the_checkpoint(tmp_path):
    # PITFALLS SYS-9: one value per step after a kill
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, values in ((0, [0, 1, 2, 3]), (2, [20, 30])):
        accelerator = track(tmp_path, start)
        for step, value in enumerate(values, start):
            pf.log_metrics(accelerator, tmp_path, step, {"loss": value})
        time.sleep(1.01)  # files of one second are read in the order of a counter that is compared as text
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 0), (1, 1), (2, 20), (3, 30)]


def test_a_console_line_shows_what_it_is_asked_for(tmp_path, capsys):
    metrics = {"a/b": 0.123456, "c": 2.0}
    pf.log_metrics(Accelerator(cpu=True), tmp_path, 3, metrics, ("a/b", "missing"), "/9, 5 s left")
    assert capsys.readouterr().out == f"{tmp_path.name} 3/9, 5 s left  a/b 0.1235\n"


def test_ranks_other_than_the_first_write_nothing(tmp_path, capsys):
    pf.log_metrics(SimpleNamespace(is_main_process=False), tmp_path, 3, {"a": 1.0}, ("a",))
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- trackers


def track(folder: Path, step: int, tracker: str = "tensorboard") -> Accelerator:
    """An accelerator whose tracker is open, as at the start of a run that goes on from the checkpoint of
    `step`."""
    accelerator = pf.start_accelerator(tracker=tracker, folder=str(folder))
    args = pf.Args(**ARGS, output_dir=str(folder), log_with=tracker)
    pf.open_metrics(accelerator, args, folder, step)
    return accelerator


class Notes(tracking.GeneralTracker):
    """Stands for an installed tracker of accelerate."""

    name, requires_logging_directory, tracker = "wandb", False, None

    def __init__(self, project, **settings):
        self.said = [("project", project, settings)]
        super().__init__()

    def store_init_configuration(self, values):
        self.said.append(("settings", values["lr"], values["critic_init"]))

    def log(self, values, step=None, **_):
        self.said.append((step, values))


@pytest.fixture
def notes(monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Notes)
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.WANDB])


def test_a_tracker_gets_project_settings_and_metrics(notes, tmp_path):
    accelerator = track(tmp_path, 0, "wandb")
    pf.log_metrics(accelerator, tmp_path, 3, {"a": 1.0, "b": 2})
    said = [("project", "pfppo", {}), ("settings", 5e-7, None), (3, {"a": 1.0, "b": 2})]
    assert accelerator.trackers[0].said == said
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_no_tracker_leaves_metrics_jsonl_alone(tmp_path):
    pf.log_metrics(track(tmp_path, 0, "none"), tmp_path, 3, {"a": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 3, "a": 1.0}\n'


@pytest.mark.parametrize("script", [sft, rm, pf], ids=lambda module: module.__name__)
@pytest.mark.parametrize("name", ["wandb", "wandbb"])
def test_a_tracker_that_is_not_installed_is_refused_first(monkeypatch, tmp_path, script, name):
    # one line that says what is there and what to do, before anything is read
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    names = {"log_with": name, "output_dir": str(tmp_path / "run"), "shard": False}
    advice = {"wandb": "pip install wandb", "wandbb": "choose one of them"}[name]
    message = f"^--log_with {name}: here are none, tensorboard; {advice}$"
    with pytest.raises(SystemExit, match=message):
        script.main(SimpleNamespace(**names))


# ---------------------------------------------------------------- progress


def spoken(monkeypatch, capsys, seconds: list[float], rank: int = 0) -> list[str]:
    """What is said of a phase whose parts take so long; the parts come out as they went in."""
    now, state = [100.0], SimpleNamespace(is_main_process=rank == 0)
    monkeypatch.setattr(pf, "time", SimpleNamespace(time=lambda: now[0]))
    monkeypatch.setattr(pf, "PartialState", lambda: state)
    came = []
    for i in pf.progress(range(len(seconds)), "scoring: batch"):
        came.append(i)
        now[0] += seconds[i]
    assert came == list(range(len(seconds)))
    return capsys.readouterr().out.splitlines()


def test_a_long_phase_says_every_30_seconds_how_far_it_is(monkeypatch, capsys):
    # 12, 24, 36, 48, 60, 72 seconds in: at 36, and 36 later
    assert spoken(monkeypatch, capsys, [12.0] * 7) == ["scoring: batch 3/7", "scoring: batch 6/7"]


def test_a_phase_under_30_seconds_says_nothing(monkeypatch, capsys):
    assert spoken(monkeypatch, capsys, [0.1] * 299) == []


def test_other_ranks_say_nothing(monkeypatch, capsys):
    assert spoken(monkeypatch, capsys, [31.0] * 3, rank=1) == []
