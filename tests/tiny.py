"""A tiny offline world for the tests: a character tokenizer, seeded two-layer models, prompts; all in
temporary folders. And the fixtures of all tests: conftest.py loads this module as a plugin."""

import functools
import gc
import json
import os
import signal
import sys
from pathlib import Path

import fork_server
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
)

import pfppo_single as pf
import rm_single as rm
import sft_single as sft

torch.set_num_threads(1)


def drawn(tensor, *rest, draw=torch.nn.init._no_grad_normal_, **named):
    """Nothing is drawn for the weights that `from_pretrained` makes on the meta device, to be replaced: torch
    does it in Python there, which would take a tenth of a tiny run."""
    return tensor if tensor.is_meta else draw(tensor, *rest, **named)


torch.nn.init._no_grad_normal_ = drawn

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 =+\n"
CHAT_TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)


def make_tokenizer(bos: bool = False, pad: str | None = None) -> PreTrainedTokenizerFast:
    """One token per character. `pad` may be None, as in many real tokenizers, "<pad>" or "<eos>"; with `bos`,
    plain text starts with <s>."""
    tokens = ["<unk>", *CHARACTERS, "<s>", "<eos>", "<pad>"]  # id 0, fed to padded columns, is no padding
    ids = {token: i for i, token in enumerate(tokens)}
    inner = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", ids["<s>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>" if bos else None,
        eos_token="<eos>",
        pad_token=pad,
        chat_template=CHAT_TEMPLATE,
    )


VOCAB_SIZE = len(make_tokenizer())
EOS = VOCAB_SIZE - 2


def model_config(name: str, **changes):
    """GPT-2 (absolute positions, tied output, the library's dropout of 0.1) or Llama (rotary, grouped heads,
    untied output)."""
    if name == "gpt2":
        sizes = dict(n_embd=32, n_layer=2, n_head=2, n_positions=128, initializer_range=0.3)
        sizes["activation_function"] = "gelu_pytorch_tanh"  # as load_config has it
        return GPT2Config(
            **{"vocab_size": VOCAB_SIZE, "eos_token_id": EOS, "bos_token_id": EOS, **sizes, **changes}
        )
    sizes = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=False,
        attention_dropout=0.1,
    )
    return LlamaConfig(
        **{"vocab_size": VOCAB_SIZE, "eos_token_id": EOS, "bos_token_id": EOS, **sizes, **changes}
    )


def causal_lm(name: str, seed: int = 0, **changes) -> torch.nn.Module:
    """A seeded language model in eval mode whose next-token distribution is far from uniform (wide initial
    weights). GPT-2 writes EOS about one time in six, so that response lengths differ."""
    torch.manual_seed(seed)
    model = {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM}[name](model_config(name, **changes)).eval()
    if name == "gpt2" and model.config.vocab_size == VOCAB_SIZE:
        model.transformer.ln_f.bias.data += 0.8 * model.transformer.wte.weight.data[EOS]
    return model


def reward_model(name: str = "gpt2", seed: int = 1, bound: str = "none", **changes) -> pf.RewardModel:
    """A seeded reward model with a gain and a bias that are not 1 and 0."""
    torch.manual_seed(seed)
    dropout = {"gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"), "llama": ("attention_dropout",)}[name]
    config = model_config(name, **{**dict.fromkeys(dropout, 0.0), **changes})
    model = pf.RewardModel({"gpt2": GPT2Model, "llama": LlamaModel}[name](config), bound=bound).eval()
    model.reward_gain.data.fill_(0.7)
    model.reward_bias.data.fill_(0.3)
    return model


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folders `gpt2`, `llama` (policies with a hostile generation_config), `reward`, `reward_tanh`, and files
    of prompts: 12 training prompts of 3 to 9 characters in prompts.jsonl, 11 other ones in eval.jsonl."""
    folder = tmp_path_factory.mktemp("world")
    hostile = dict(
        do_sample=True, top_k=1, top_p=0.1, temperature=0.01, repetition_penalty=9.0, max_new_tokens=2
    )
    for name in ("gpt2", "llama"):
        model = causal_lm(name)
        model.generation_config = GenerationConfig(eos_token_id=0, **hostile)
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    for name, bound in (("reward", "none"), ("reward_tanh", "tanh")):
        rm.as_classifier(reward_model(bound=bound)).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    words = "add,one two,x=1,sum of,max,min 9,abc def g,rev,sort me,len,odd one,even".split(",")
    write_jsonl(folder / "prompts.jsonl", [{"prompt": w, "n": i} for i, w in enumerate(words)])
    write_jsonl(folder / "eval.jsonl", [{"prompt": f"held {'q' * (i % 4)}{i}", "n": i} for i in range(11)])
    return folder


def one_block(folder: Path) -> Path:
    """Writes folders `gpt2` and `reward` of models with one block, for tests of many runs."""
    causal_lm("gpt2", seed=2, n_layer=1).save_pretrained(folder / "gpt2")
    rm.as_classifier(reward_model(n_layer=1)).save_pretrained(folder / "reward")
    for name in ("gpt2", "reward"):
        make_tokenizer().save_pretrained(folder / name)
    return folder


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_settings(world: Path, output_dir: Path) -> dict:
    """Settings of a run of two updates that takes about a second: 4 prompts x 4 responses of up to 8 tokens,
    BR keeps 2 of 4."""
    return dict(
        output_dir=str(output_dir),
        policy=str(world / "gpt2"),
        reward=str(world / "reward"),
        prompts=str(world / "prompts.jsonl"),
        query_length=16,
        total_episodes=32,
        batch_size=4,
        num_responses=4,
        response_length=8,
        forward_batch_size=8,
        normalize_samples=16,
        minibatch_size=4,
        micro_batch_size=3,
        noptepochs=2,
        lr=1e-3,
        critic_lr=1e-3,
        eval_every=1,
        print_samples_every=0,
        checkpoint_every=1,
    )


SFT_ROWS = [
    {"prompt": "copy " + "ab3 x"[: 1 + i % 5], "response": "=" + "xy1" * (i % 4) + "z" * (i % 3), "number": i}
    for i in range(19)
]
HELD_OUT_ROWS = [{"prompt": f"held {'q' * (i % 4)}{i}", "response": "ok" * (1 + i % 3)} for i in range(11)]
PAIRS = [
    {"prompt": "say " + "abcde"[: 1 + i % 5], "chosen": "x" * (1 + i % 4), "rejected": "y" * (1 + i % 3)}
    for i in range(19)
]
HELD_OUT_PAIRS = [
    {"prompt": f"held {i}", "chosen": "x" * (1 + i % 2), "rejected": "y" * (1 + i % 3)} for i in range(11)
]


def sft_settings(world: Path, output_dir: Path, **changes) -> dict:
    """Settings of an SFT of 6 steps of 8, 8 and 3 rows, twice, in under a second."""
    folder = output_dir.parent
    settings = dict(output_dir=str(output_dir), model=str(world / "gpt2"))
    settings["train_data"] = str(write_jsonl(folder / "sft.jsonl", SFT_ROWS))
    settings["eval_data"] = str(write_jsonl(folder / "held_out.jsonl", HELD_OUT_ROWS))
    settings |= dict(epochs=2, batch_size=8, micro_batch_size=3, forward_batch_size=4, lr=1e-3, log_every=1)
    return settings | dict(query_length=32, response_length=24) | changes


def rm_settings(world: Path, output_dir: Path, **changes) -> dict:
    """Settings of a reward model of 6 steps of 8, 8 and 3 labels, twice, in about a second."""
    folder = output_dir.parent
    settings = dict(output_dir=str(output_dir), model=str(world / "gpt2"))
    settings["train_data"] = str(write_jsonl(folder / "pairs.jsonl", PAIRS))
    settings["eval_data"] = str(write_jsonl(folder / "held_out_pairs.jsonl", HELD_OUT_PAIRS))
    settings |= dict(epochs=2, batch_size=8, micro_batch_size=3, forward_batch_size=64, lr=1e-3, log_every=1)
    settings |= dict(normalize_before=True, normalize_samples=32)
    return settings | dict(query_length=16, response_length=8) | changes


@pytest.fixture
def make_args(world, tmp_path):
    """make_args(**changes) -> Args of a tiny run in a folder of its own."""

    def make(**changes) -> pf.Args:
        return pf.Args(
            **{
                **tiny_settings(world, tmp_path / "run"),
                **{k: str(v) if isinstance(v, Path) else v for k, v in changes.items()},
            }
        )

    return make


@pytest.fixture
def unchecked(monkeypatch):
    """Models are not looked over before a run (test_model_checks.py), which takes a tenth of a tiny one."""
    for script in (pf, rm, sft):
        for name in ("check_model", "check_cache"):
            monkeypatch.setattr(script, name, lambda *_: None, raising=False)


@pytest.fixture
def run(make_args, unchecked):
    """run(**changes) -> (metrics per step as a list of dicts, output folder): the whole of pfppo_single.main,
    in this process; by itself without a checkpoint before the last and without normalisation, which is an update's
    time."""

    def start(**changes):
        args = make_args(**{"normalize_reward": False, "checkpoint_every": 100, **changes})
        pf.main(args)
        return read_metrics(Path(args.output_dir)), Path(args.output_dir)

    return start


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(metrics: list[dict]) -> list[dict]:
    """Metrics without the wall-clock times."""
    return [{tag: x for tag, x in line.items() if not tag.startswith("seconds/")} for line in metrics]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Weights in a saved folder or checkpoint, by name."""
    if (folder / "rank_0.pt").is_file():
        return torch.load(folder / "rank_0.pt")[0]
    return load_file(folder / "model.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Spies:
    """Wraps functions for one run and keeps what went in and came out."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.patch, self.calls = patch, {}

    def on(self, owner, name, record) -> list:
        """record(result, *args, **kwargs) is appended to calls[name], or calls["Class.name"] for a method."""
        key = f"{owner.__name__}.{name}" if isinstance(owner, type) else name
        original, calls = getattr(owner, name), self.calls.setdefault(key, [])

        @functools.wraps(original)  # the scripts look at signatures
        def spy(*args, **kwargs):
            result = original(*args, **kwargs)
            calls.append(record(result, *args, **kwargs))
            return result

        self.patch.setattr(owner, name, spy)
        return calls


@pytest.fixture
def spies(monkeypatch):
    return Spies(monkeypatch)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """module(name, source) -> writes an importable module, for `--reward name:function`; forgotten after the
    test."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, source: str) -> str:
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return write


def make_rollout(
    query_lengths: list[int], response_lengths: list[int], response_width: int = 8, seed: int = 0
) -> dict[str, torch.Tensor]:
    """A rollout of random tokens (never EOS) as pfppo_single lays it out: queries padded left, responses
    right."""
    generator = torch.Generator().manual_seed(seed)

    def rows(lengths):
        return [torch.randint(EOS, (n,), generator=generator).tolist() for n in lengths]

    queries, query_mask = pf.pad_left(rows(query_lengths), "cpu")
    responses = torch.zeros(len(response_lengths), response_width, dtype=torch.long)
    response_mask = torch.arange(response_width) < torch.tensor(response_lengths).unsqueeze(1)
    for i, row in enumerate(rows(response_lengths)):
        responses[i, : len(row)] = torch.tensor(row)
    rollout = {"queries": queries, "query_mask": query_mask, "responses": responses}
    return rollout | {"response_mask": response_mask, "score_mask": response_mask}


class Forks:
    """A parent process that has imported much and forks children on request (fork_server.py)."""

    def __init__(self, server: int, requests, answers):
        self.server, self.requests, self.answers = server, requests, answers

    def __call__(
        self, module, function, *arguments, folder, processes=1, kill_at=None, kill_after=None, path=()
    ) -> dict:
        """module.function(*arguments) in `processes` new processes -> {codes, seconds, results, operations,
        printed}, all but seconds and operations per rank. SIGKILL in place of file operation kill_at of rank 0 in
        `folder`, or after kill_after seconds; `path` comes first in sys.path. What fails without being killed
        raises, but for run_command, run_code and launch."""
        request = dict(module=module, function=function, arguments=arguments, folder=str(folder))
        request |= dict(processes=processes, kill_at=kill_at, kill_after=kill_after)
        request["path"] = [*map(str, path), *sys.path]
        logs = [Path(f"{folder}.log_{rank}") for rank in range(processes)]
        [log.touch() for log in logs]  # a process may be killed before it opens its own
        print(json.dumps(request), file=self.requests, flush=True)
        answer = json.loads(self.answers.readline())
        answer["printed"] = [log.read_text() for log in logs]
        [log.unlink() for log in logs]
        killed = -signal.SIGKILL in answer["codes"] and (kill_at, kill_after) != (None, None)
        may_fail = killed or function in ("run_command", "run_code", "launch")
        assert may_fail or not any(answer["codes"]), "\n".join(answer["printed"])
        return answer

    def close(self):
        self.requests.close()  # the server ends
        self.answers.close()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session):
    """Before any test computes something, since a process with threads is not forked safely."""
    if hasattr(session.config, "workerinput"):  # all tests are about to run, and need what the server needs
        fork_server.warm_up()
    gc.freeze()  # a million objects of libraries, which a full collection would look through for half a second
    session.config.forks = Forks(*fork_server.fork_here())
    session.config.bare = Forks(*session.config.bare)


def pytest_sessionfinish(session):
    for forks in (
        session.config.forks,
        session.config.bare,
    ):  # the older one's pipe is in the younger one too
        forks.close()
        os.waitpid(forks.server, 0)


@pytest.fixture(scope="session")
def forks(request):
    """The server that is a fork of this process: all that a run imports is there."""
    return request.config.forks


@pytest.fixture(scope="session")
def bare(request):
    """The server that has imported nothing but torch and accelerate, for what is imported when."""
    return request.config.bare
