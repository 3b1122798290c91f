"""A tiny offline world for the tests: a character tokenizer, seeded two-layer models, prompts; all in
temporary folders."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read at import; subprocesses inherit it
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
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

torch.set_num_threads(1)

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 =+\n"
CHAT_TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)


def make_tokenizer(bos: bool = False, pad: str | None = "<pad>") -> PreTrainedTokenizerFast:
    """One token per character. `pad` may be "<eos>" (pad = eos) or None; with `bos`, plain text starts with
    <s>."""
    tokens = [
        "<unk>",
        *CHARACTERS,
        "<s>",
        "<eos>",
        "<pad>",
    ]  # pad is not id 0: id 0 is what padded columns are fed as
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
    words = [
        "add",
        "one two",
        "x=1",
        "sum of",
        "max",
        "min 9",
        "abc def g",
        "rev",
        "sort me",
        "len",
        "odd one",
        "even",
    ]
    write_jsonl(folder / "prompts.jsonl", [{"prompt": w, "n": i} for i, w in enumerate(words)])
    write_jsonl(folder / "eval.jsonl", [{"prompt": f"held {'q' * (i % 4)}{i}", "n": i} for i in range(11)])
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
def run(make_args):
    """run(**changes) -> (metrics per step as a list of dicts, output folder): the whole of pfppo_single.main,
    in this process."""

    def start(**changes):
        args = make_args(**changes)
        pf.main(args)
        return read_metrics(Path(args.output_dir)), Path(args.output_dir)

    return start


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


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
    query_lengths: list[int],
    response_lengths: list[int],
    response_width: int = 8,
    pad_id: int = VOCAB_SIZE - 1,
    seed: int = 0,
    vocab_size: int = EOS,
) -> dict[str, torch.Tensor]:
    """A rollout of random tokens (never EOS or pad) as pfppo_single lays it out: queries padded left,
    responses right."""
    generator = torch.Generator().manual_seed(seed)

    def rows(lengths):
        return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]

    queries, query_mask = pf.pad_left(rows(query_lengths), "cpu")
    responses = torch.full((len(response_lengths), response_width), pad_id)
    response_mask = torch.arange(response_width) < torch.tensor(response_lengths).unsqueeze(1)
    for i, row in enumerate(rows(response_lengths)):
        responses[i, : len(row)] = torch.tensor(row)
    return {
        "queries": queries,
        "query_mask": query_mask,
        "responses": responses,
        "response_mask": response_mask,
        "score_mask": response_mask,
    }
