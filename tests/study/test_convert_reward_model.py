"""Reward models of older versions: converted, they give the same scores bit for bit and keep their tokenizer."""

import pytest
import torch
from conftest import make_rollout, make_tokenizer, reward_model
from safetensors.torch import save_file
from transformers import AutoTokenizer

import pfppo_single as pf
from benchmark.recipes.convert_reward_model import convert


def save_old(model, folder) -> None:
    """The form that rm_single.py wrote before: the backbone, and beside it reward_head.safetensors."""
    model.lm_backbone.save_pretrained(folder)
    names = ("scalar_head.weight", "scalar_head.bias", "reward_gain", "reward_bias")
    head = {name: model.get_parameter(name).detach().clone() for name in names}
    head |= {name: head[name].reshape(()) for name in names[2:]}  # they were numbers
    save_file(head, folder / "reward_head.safetensors", metadata={"bound": model.bound})
    make_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("name, bound", [("gpt2", "tanh"), ("llama", "none")])
def test_scores_and_tokenizer_are_kept(name, bound, tmp_path):
    model, rollout = reward_model(name, bound=bound), make_rollout([3, 5, 2], [4, 8, 1])
    model.scalar_head.bias.data.fill_(0.123)
    save_old(model, tmp_path / "old")
    convert(tmp_path / "old", tmp_path / "new")
    scores = pf.reward_model_scores(pf.load_reward_model(str(tmp_path / "new")).eval(), rollout, size=2)
    assert torch.equal(scores, pf.reward_model_scores(model, rollout, size=2))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    pf.check_reward_model(str(tmp_path / "new"), "reward", tokenizer, [[1]], 4)


def test_what_cannot_be_converted_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no reward_head.safetensors"):
        convert(tmp_path, tmp_path / "new")
    save_old(reward_model(), tmp_path / "old")
    with pytest.raises(SystemExit, match="is there already"):
        convert(tmp_path / "old", tmp_path)


def test_pfppo_names_the_tool_for_an_older_folder(tmp_path):
    save_old(reward_model(), tmp_path / "old")
    with pytest.raises(SystemExit, match="benchmark.recipes.convert_reward_model"):
        pf.check_reward_model(str(tmp_path / "old"), "reward", make_tokenizer(), [[1]], 4)
