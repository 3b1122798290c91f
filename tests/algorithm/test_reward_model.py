"""Reward model and critic: what is read where, files that plain transformers reads too (PITFALLS RM)."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import EOS, VOCAB_SIZE, causal_lm, make_rollout, make_tokenizer, model_config, reward_model
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import pfppo_single as pf
import rm_single as rm

ROWS = [[5, 6, 7, EOS], [8, 9], [3, EOS, 4, 5, 6, 7, 8]]


def at_last_token(model, rows=ROWS) -> torch.Tensor:
    """Unbounded scores of rows of ids, batched with padding on the left."""
    with torch.no_grad():
        return model(*pf.pad_left(rows, "cpu"))[:, -1]


def saved(model: pf.RewardModel, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The folder that rm_single.py would write for a reward model."""
    rm.as_classifier(model).to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_score_is_read_at_the_last_token(name):
    # PITFALLS RM-1: EOS included when present; hidden state @ weight + bias, then gain and bias
    model = reward_model(name)
    with torch.no_grad():
        for score, row in zip(at_last_token(model), ROWS):
            hidden = model.lm_backbone(torch.tensor([row])).last_hidden_state[0, -1]
            expected = 0.7 * (hidden @ model.scalar_head.weight[0] + model.scalar_head.bias[0]) + 0.3
            assert score.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("bound", ["none", "tanh"])
def test_scores_of_a_rollout_are_those_of_its_rows_alone(bound):
    # PITFALLS RM-1: PPO's scoring function on padded queries and responses in micro-batches = the model on
    # the plain row; the bound acts on what is read
    model, rollout = reward_model(bound=bound), make_rollout([3, 6, 1, 4], [2, 8, 5, 1])
    model.reward_gain.data.fill_(3.0)
    rows = [
        torch.cat([query[mask], response[kept]]).tolist()
        for query, mask, response, kept in zip(*(rollout[name] for name in list(rollout)[:4]))
    ]
    alone = torch.cat([at_last_token(model, [row]) for row in rows])
    expected = alone.tanh() if bound == "tanh" else alone
    torch.testing.assert_close(pf.reward_model_scores(model, rollout, 2), expected, atol=1e-5, rtol=0)
    assert alone.abs().max() > 1


def test_a_stop_token_in_the_middle_ends_what_the_reward_model_reads():
    # PITFALLS RM-1, RM-5: without masking the response runs on, the score is still read at the stop token
    model, rollout = reward_model(), make_rollout([3, 6], [8, 8])
    short = {**rollout, "score_mask": torch.arange(8) < torch.tensor([[3], [8]])}
    cut = {**rollout, "score_mask": short["score_mask"], "response_mask": short["score_mask"]}
    found, alone, whole = (pf.reward_model_scores(model, rows, 1) for rows in (short, cut, rollout))
    torch.testing.assert_close(found, alone)
    assert (found - whole)[0].abs() > 1e-3


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("bound", ["none", "tanh"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_saved_reward_model_gives_equal_scores(tmp_path, name, bound):
    # PITFALLS RM-2: head, head bias, gain, bias and bound are in the folder
    model = reward_model(name, bound=bound)
    loaded = pf.load_reward_model(str(saved(model, tmp_path))).eval()
    assert torch.equal(at_last_token(model), at_last_token(loaded)) and loaded.bound == bound
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_plain_transformers_reads_the_same_score(tmp_path, name, dtype):
    # a classification model with one label; what that class has no place for stands in its configuration:
    # R = reward_gain · (logit + score_bias) + reward_bias, in the dtype of the files as well
    model = reward_model(name, bound="tanh")
    model.scalar_head.bias.data.fill_(0.4)
    plain, info = AutoModelForSequenceClassification.from_pretrained(
        saved(model, tmp_path, dtype), output_loading_info=True, dtype=dtype
    )
    config = plain.config
    assert config.num_labels == 1 and not info["missing_keys"] and not info["unexpected_keys"]
    assert (config.reward_bound, config.score_bias) == ("tanh", pytest.approx(0.4))
    for row, score in zip(ROWS, at_last_token(pf.load_reward_model(str(tmp_path), dtype).eval())):
        with torch.no_grad():
            logit = plain.eval()(torch.tensor([row])).logits[0, 0].float()
        found = config.reward_gain * (logit + config.score_bias) + config.reward_bias
        assert found.item() == pytest.approx(score.item(), abs=0.03 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_frozen_reward_model_in_bfloat16_keeps_its_head_in_float32(tmp_path, name):
    # PITFALLS LP-7: scores with float32's digits, from a backbone that takes half the memory
    model = pf.load_reward_model(str(saved(reward_model(name), tmp_path)), torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {dtypes.pop(key) for key in list(dtypes) if "backbone" not in key} == {torch.float32}
    assert set(dtypes.values()) == {torch.bfloat16}
    scores = at_last_token(model)
    assert scores.dtype == torch.float32 and (scores != scores.bfloat16().float()).any()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_classifier_of_others_is_read_as_it_is(tmp_path, name):
    # plain transformers, nothing of ours in the configuration: R is the logit
    config = model_config(name, num_labels=1, attn_pdrop=0.1)
    torch.manual_seed(3)
    foreign = AutoModelForSequenceClassification.from_config(config).eval()
    foreign.save_pretrained(tmp_path)
    ours = pf.load_reward_model(str(tmp_path)).eval()
    with torch.no_grad():
        logits = torch.stack([foreign(torch.tensor([row])).logits[0, 0] for row in ROWS])
    torch.testing.assert_close(at_last_token(ours), logits, atol=1e-5, rtol=0)
    assert ours.bound == "none" and ours.reward_gain == 1 and logits.std() > 0.01


def check(folder: Path, queries=((1, 2),), new_tokens=8, tokenizer=None) -> None:
    """check_reward_model as main calls it for --reward."""
    pf.check_reward_model(str(folder), "reward", tokenizer or make_tokenizer(), queries, new_tokens)


def test_a_policy_that_may_write_more_ids_than_the_reward_model_has_is_refused(tmp_path):
    # padding of a vocabulary has no names, so that the tokenizers agree; one such id would end the run
    model_config("gpt2", num_labels=1, architectures=["GPT2ForSequenceClassification"]).save_pretrained(
        tmp_path
    )
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    pf.check_reward_model(str(tmp_path), "reward", tokenizer, [[1]], 1, VOCAB_SIZE)
    message = f"^--reward .*: {VOCAB_SIZE} tokens, fewer than the 64 .*resize_token_embeddings.64."
    with pytest.raises(SystemExit, match=message):
        pf.check_reward_model(str(tmp_path), "reward", tokenizer, [[1]], 1, 64)


def broken(kind: str, folder: Path) -> None:
    """Writes a folder that is no reward model for the policy, or has too few positions."""
    make_tokenizer().save_pretrained(folder)
    if kind == "causal":
        causal_lm("gpt2").save_pretrained(folder)
    elif kind == "no score":
        sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        config = BertConfig(vocab_size=VOCAB_SIZE, num_labels=1, **sizes)
        BertForSequenceClassification(config).save_pretrained(folder)
    elif kind == "two labels":
        config = model_config("gpt2", num_labels=2)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    elif kind == "old form":
        save_file({"scalar_head.weight": torch.zeros(1, 32)}, folder / "reward_head.safetensors")
    else:
        saved(reward_model(n_positions=8 if kind == "short" else 128), folder)
        ids = json.loads((folder / "tokenizer.json").read_text())
        vocab = ids["model"]["vocab"]
        if kind == "other ids":
            vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        (folder / "tokenizer.json").write_text(json.dumps(ids))


@pytest.mark.parametrize(
    "kind, message",
    [
        (
            "causal",
            "a GPT2LMHeadModel is no reward model; give a sequence classification model with one label",
        ),
        ("no score", "a BertForSequenceClassification is no reward model"),
        ("two labels", "a GPT2ForSequenceClassification is no reward model; .* one label"),
        ("old form", "older form; convert it: python -m benchmark.recipes.convert_reward_model"),
        ("short", "the model has 8 positions, not 10"),
        ("other ids", "its tokenizer differs from --policy's"),
    ],
)
def test_what_is_no_reward_model_is_refused_before_weights_are_loaded(tmp_path, monkeypatch, kind, message):
    # PITFALLS RM-2, TOK-1: a head is never made up; in one line that names the field and, but for positions,
    # the folder
    broken(kind, tmp_path)
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", None)
    with pytest.raises(SystemExit, match=f"^--reward.*{message}") as refusal:
        check(tmp_path)
    assert "\n" not in str(refusal.value) and (kind == "short" or str(tmp_path) in str(refusal.value))


def test_what_fits_the_policy_is_not_refused(tmp_path):
    # as many positions as are needed; a pad token that only the reward model has, or that is EOS, reads no
    # id of the policy's otherwise
    saved(reward_model(n_positions=10), tmp_path)
    check(tmp_path)
    for pad in ("<eos>", "<pad>", "[PAD]"):
        make_tokenizer(pad=pad).save_pretrained(tmp_path)
        check(tmp_path)


def test_a_classifier_whose_head_is_not_in_the_files_is_refused(tmp_path):
    # PITFALLS RM-2: an architecture that promises a head is no head
    saved(reward_model(), tmp_path)
    causal_lm("gpt2").save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other/model.safetensors", tmp_path)
    with pytest.raises(SystemExit, match="^--reward .*no weights for score.weight"):
        pf.load_reward_model(str(tmp_path))


def test_writing_a_reward_model_changes_nothing_in_it():
    # it is written while it is in use: gain, bias and configuration stay
    model = reward_model()
    before, config = copy.deepcopy(model.state_dict()), model.lm_backbone.config.to_dict()
    rm.as_classifier(model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert model.lm_backbone.config.to_dict() == config


# ---------------------------------------------------------------- in a run


def test_normalisation_is_fixed_and_divides_by_the_standard_deviation(run, module):
    # PITFALLS RM-3, GAE-10: mean 3 and standard deviation 2 of the reward on π_SFT, measured once and used
    # for all later scores
    module(
        "counting_reward",
        (
            "calls = []\n"
            "def reward(prompts, responses, rows):\n"
            "    calls.append(len(responses))\n"
            "    if len(calls) == 1:\n"
            "        return [1.0, 5.0] * (len(responses) // 2)\n"  # mean 3, deviation 2 · sqrt(16 / 15)
            "    return [10.0 * len(calls) + i for i in range(len(responses))]\n"
        ),
    )
    metrics, folder = run(reward="counting_reward:reward", normalize_samples=16)
    std = 2 * (16 / 15) ** 0.5
    for step, line in enumerate(metrics, 2):
        assert line["objective/score"] == pytest.approx(10 * step + 7.5)
        assert line["objective/shaped_score"] == pytest.approx((10 * step + 7.5 - 3) / std, rel=1e-5)
    state = json.loads(next((folder / "checkpoints").glob("step_*/state.json")).read_text())
    expected = (pytest.approx(3), pytest.approx(std))
    assert (state["reward_mean"], state["reward_std"]) == expected  # PITFALLS RM-2: in the checkpoint


def spy_on_first_values(monkeypatch):
    """Records the critic's weights, the rollout and the values at the first call of
    response_logprobs_and_values with a critic."""
    seen, original = {}, pf.response_logprobs_and_values

    def spy(model, rollout, temperature, size):
        logprobs, values = original(model, rollout, temperature, size)
        if isinstance(model, pf.PolicyAndCritic) and not seen:
            state = {name: value.clone() for name, value in model.critic.state_dict().items()}
            seen.update(values=values, rollout=dict(rollout), state=state)
        return logprobs, values

    monkeypatch.setattr(pf, "response_logprobs_and_values", spy)
    return seen


@pytest.mark.parametrize("bound", ["reward", "reward_tanh"])
def test_critic_starts_as_the_reward_model(run, world, monkeypatch, bound):
    # PITFALLS RM-4: through main; values are what the (unbounded) reward model says of each prefix
    seen = spy_on_first_values(monkeypatch)
    run(reward=world / bound, total_episodes=16)
    reward, rollout = pf.load_reward_model(str(world / bound)).eval(), seen["rollout"]
    assert all(torch.equal(seen["state"][name], value) for name, value in reward.state_dict().items())
    for i in range(3):
        query = rollout["queries"][i][rollout["query_mask"][i]].tolist()
        response = rollout["responses"][i][rollout["response_mask"][i]].tolist()
        expected = torch.cat([at_last_token(reward, [query + response[:t]]) for t in range(len(response))])
        torch.testing.assert_close(seen["values"][i, : len(response)], expected, atol=1e-5, rtol=0)


def test_a_classifier_of_others_is_reward_and_critic_of_a_run(run, tmp_path, monkeypatch):
    # PITFALLS RM-4: as --reward and as --critic_init, with nothing of ours in its configuration
    torch.manual_seed(3)
    for name in ("reward", "critic"):
        foreign = AutoModelForSequenceClassification.from_config(model_config("llama", num_labels=1))
        foreign.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    seen = spy_on_first_values(monkeypatch)
    metrics, _ = run(reward=tmp_path / "reward", critic_init=tmp_path / "critic", total_episodes=16)
    assert metrics[0]["objective/score"] != 0
    head = foreign.score.weight  # of the second, which is the critic
    assert torch.equal(seen["state"]["scalar_head.weight"], head) and seen["values"].any()


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_critic_without_a_reward_model_starts_at_zero(run, monkeypatch, module, critic):
    # PITFALLS RM-4: a reward function has no weights to start from; shared and separate heads start at 0
    module(
        "lengths", "def reward(prompts, responses, rows):\n    return [float(len(r)) for r in responses]\n"
    )
    seen = spy_on_first_values(monkeypatch)
    run(reward="lengths:reward", critic=critic, total_episodes=16)
    assert (seen["values"] == 0).all()
