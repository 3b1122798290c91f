"""What the three scripts write, as other tools read it; no pad token is needed, none is made up."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import (
    EOS,
    causal_lm,
    make_tokenizer,
    model_config,
    rm_settings,
    sft_settings,
    tiny_settings,
    weights,
    write_jsonl,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import pfppo_single as pf
import rm_single as rm
import sft_single as sft

SCRIPTS = {"sft": sft, "rm": rm, "pf": pf}


def trained(name: str, world: Path, folder: Path, **changes) -> Path:
    """The model that a tiny run of a script writes."""
    if name == "pf":
        short = dict(total_episodes=16, noptepochs=1, normalize_reward=False)
        settings = tiny_settings(world, folder / name) | short | changes
    else:
        short = dict(epochs=1) | (dict(normalize_before=False, normalize_after=False) if name == "rm" else {})
        settings = {"sft": sft_settings, "rm": rm_settings}[name](world, folder / name, **short, **changes)
    SCRIPTS[name].main(SCRIPTS[name].Args(**settings))
    return folder / name / ("policy" if name == "pf" else "model")


@pytest.fixture(scope="module")
def models(world, tmp_path_factory):
    """What each script writes from a policy whose tokenizer has no pad token."""
    folder = tmp_path_factory.mktemp("models")
    return {name: trained(name, world, folder) for name in SCRIPTS}


# ---------------------------------------------------------------- no pad token


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_pad_token_is_made_up(models, world, name):
    # the tokenizer is the one that was given, with as many tokens; the embedding has not grown
    found, given = (AutoTokenizer.from_pretrained(folder) for folder in (models[name], world / "gpt2"))
    assert given.pad_token is None and found.pad_token is None and found.get_vocab() == given.get_vocab()
    assert weights(models[name])["transformer.wte.weight"].shape == (len(given), 32)


@pytest.mark.parametrize("name", ["sft", "pf"])
def test_plain_transformers_generates_in_batches(models, name):
    # greedy, from queries of three lengths, what our own sampler gives; it stops at the stop token
    policy, tokenizer = (
        AutoModelForCausalLM.from_pretrained(models[name]),
        AutoTokenizer.from_pretrained(models[name]),
    )
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    queries = ["add", "one two", "x"]
    batch = tokenizer(queries, return_tensors="pt", padding=True)
    found = policy.generate(**batch, max_new_tokens=16, do_sample=False)[:, batch["input_ids"].shape[1] :]
    rows = [pf.encode_prompt(tokenizer, query) for query in queries]
    ours = pf.generate(policy, *pf.pad_left(rows, "cpu"), 1, 16, 0.0, EOS)
    mask, has_stop = pf.stop_masks(ours.clone(), EOS, 0)
    width = found.shape[1]
    assert torch.equal(found, torch.where(mask, ours, EOS)[:, :width]) and mask[:, width:].sum() == 0


def endings(folder: Path) -> list:
    """Pad and stop tokens of a saved policy, from all places other tools look at."""
    generation = json.loads((folder / "generation_config.json").read_text())
    config = AutoConfig.from_pretrained(folder)
    return [config.pad_token_id, generation["pad_token_id"], generation["eos_token_id"]]


@pytest.mark.parametrize("name", ["sft", "pf"])
def test_the_stop_token_ends_generation_and_pads(models, name):
    assert endings(models[name]) == [EOS] * 3


@pytest.mark.parametrize("name", ["sft", "pf"])
def test_nothing_of_the_start_models_generation_config_stays(models, name):
    # PITFALLS LP-1: its top_k = 1 would make the trained policy look greedy
    saved = json.loads((models[name] / "generation_config.json").read_text())
    assert set(saved) - {"transformers_version", "_from_model_config"} == {"eos_token_id", "pad_token_id"}


@pytest.mark.parametrize("name", ["sft", "pf"])
def test_another_stop_token_ends_generation_too(world, tmp_path, name):
    # `=`, which is no special token
    stop = make_tokenizer().convert_tokens_to_ids("=")
    assert endings(trained(name, world, tmp_path, stop_token="=")) == [stop] * 3


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_a_stop_token_models_with_several_ends_are_written_too(world, tmp_path, name):
    # as Llama 3's configuration has: a pad token is one number; found out before anything is trained, or not
    # at all
    model = causal_lm("llama")
    model.config.eos_token_id = [EOS, 1]
    model.save_pretrained(tmp_path / "start")
    make_tokenizer().save_pretrained(tmp_path / "start")
    start = {"policy" if name == "pf" else "model": str(tmp_path / "start")}
    folder = trained(name, world, tmp_path, stop_token="none", **start)
    auto_class = AutoModelForCausalLM if name != "rm" else transformers.AutoModelForSequenceClassification
    assert auto_class.from_pretrained(folder).config.pad_token_id in (EOS, None)


# ---------------------------------------------------------------- a pad token that is the stop token


@pytest.fixture(scope="module")
def padded(world, tmp_path_factory):
    """A Llama whose pad id is EOS, as the policies have that these scripts write, as policy, reward model and
    configuration; rows with EOS in their prompts, so that it is read."""
    folder = tmp_path_factory.mktemp("padded")
    torch.manual_seed(1)
    reward = transformers.AutoModelForSequenceClassification.from_config(model_config("llama", num_labels=1))
    for name, model in (("llama", causal_lm("llama")), ("reward", reward)):
        model.config.pad_token_id = EOS  # later than the weights, which would be 0 there
        model.save_pretrained(folder / name)
    model_config("llama", pad_token_id=EOS).save_pretrained(folder / "config")
    for name in ("llama", "reward", "config"):
        make_tokenizer().save_pretrained(folder / name)
    row = {"response": "b", "chosen": "b", "rejected": "cc"}
    write_jsonl(folder / "rows.jsonl", [{**row, "prompt": f"{c}<eos>a"} for c in "abcdefgh"])
    return folder


EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_pad_token_that_is_the_stop_token_learns(padded, tmp_path, name):
    # nn.Embedding's padding_idx would give it no gradient, and it would stay what it was for ever
    data = str(padded / "rows.jsonl")
    settings = dict(model=str(padded / "llama"), train_data=data, eval_data=None)
    if name == "pf":
        settings = dict(policy=str(padded / "llama"), reward=str(padded / "reward"), prompts=data)
    after = weights(trained(name, padded, tmp_path, **settings))[EMBEDDING]
    before = weights(padded / "llama")[EMBEDDING]
    assert not torch.equal(after[EOS], before[EOS])


def test_it_learns_from_scratch_too(padded, tmp_path):
    settings = dict(train_data=str(padded / "rows.jsonl"), eval_data=None)
    settings |= dict(model=None, model_config=str(padded / "config"))
    found = []
    for lr in (0.0, 1e-3):
        (tmp_path / str(lr)).mkdir()
        found.append(weights(trained("sft", padded, tmp_path / str(lr), **settings, lr=lr))[EMBEDDING])
    start, after = found
    assert not torch.equal(after[EOS], start[EOS])


@pytest.mark.parametrize("critic_init", ["reward", None])
def test_it_learns_in_the_critic(padded, tmp_path, monkeypatch, critic_init):
    # from a reward model as well as from the policy
    seen, make_critic = [], pf.make_critic

    def watched(*args):
        critic = make_critic(*args)
        embedding = critic.lm_backbone.get_input_embeddings().weight
        seen.append((embedding, embedding.detach().clone()))
        return critic

    monkeypatch.setattr(pf, "make_critic", watched)
    (tmp_path / "ones.py").write_text(
        "def f(prompts, responses, rows):\n    return [len(r) for r in responses]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    reward = str(padded / "reward") if critic_init else "ones:f"
    trained(
        "pf",
        padded,
        tmp_path,
        policy=str(padded / "llama"),
        reward=reward,
        prompts=str(padded / "rows.jsonl"),
    )
    (after, before), *_ = seen
    assert not torch.equal(after[EOS], before[EOS])


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_folder_is_replaced_as_a_whole(models, world, tmp_path, monkeypatch, name):
    # PITFALLS SYS-10: what was there stays whole until the new one is
    tokenizer, accelerator = make_tokenizer(), pf.start_accelerator()
    shutil.copytree(models[name], tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(type(tokenizer), "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("full")))
        SCRIPTS[name].save_model(accelerator, causal_lm("gpt2", seed=5), tokenizer, EOS, tmp_path / "model")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    SCRIPTS[name].save_model(accelerator, causal_lm("gpt2", seed=5), tokenizer, EOS, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model/model.safetensors").read_bytes() != before["model.safetensors"]
