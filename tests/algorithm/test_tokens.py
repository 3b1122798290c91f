"""Tokens, padding, positions, sampling and log-probabilities (PITFALLS TOK and LP)."""

import dataclasses
import inspect

import pytest
import torch
from conftest import EOS, VOCAB_SIZE, causal_lm, make_rollout, make_tokenizer, reward_model
from scipy.stats import chisquare
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

import pfppo_single as pf

SETTINGS = pf.Args(policy="", reward="", prompts="", temperature=1.0)


def pad_more(rollout, columns):
    """The same rows with more padding on the left of the queries (filled with a real token's id, which must
    not matter)."""
    extra = torch.full((len(rollout["queries"]), columns), 7)
    return {
        **rollout,
        "queries": torch.cat([extra, rollout["queries"]], 1),
        "query_mask": torch.cat([torch.zeros_like(extra, dtype=torch.bool), rollout["query_mask"]], 1),
    }


def forward(model, rollout):
    """Logits and values of a rollout with all its padding (pf.trim would take shared padding away)."""
    ids = torch.cat([rollout["queries"], rollout["responses"]], 1)
    mask = torch.cat([rollout["query_mask"], rollout["response_mask"]], 1)
    with torch.no_grad():
        return model(ids, mask, rollout["responses"].shape[1])


@pytest.fixture(scope="module")
def gpt2():
    return pf.PolicyAndCritic(causal_lm("gpt2"), reward_model()).eval()


# ---------------------------------------------------------------- tokens, padding, positions


@pytest.mark.parametrize("columns", [1, 7, 30])
def test_left_padding_moves_no_logprob_and_no_value(gpt2, columns):
    # PITFALLS TOK-1: GPT-2 has absolute positions, so wrong position ids show
    rollout = make_rollout([5], [8])
    logits, values = forward(gpt2, rollout)
    padded_logits, padded_values = forward(gpt2, pad_more(rollout, columns))
    assert (logits.log_softmax(-1) - padded_logits.log_softmax(-1)).abs().max() < 1e-4
    assert (values - padded_values).abs().max() < 1e-4


def test_positions_matter_to_the_model_of_these_tests(gpt2):
    # without this the test above could not fail
    rollout = pad_more(make_rollout([5], [8]), 7)
    ids = torch.cat([rollout["queries"], rollout["responses"]], 1)
    mask = torch.cat([rollout["query_mask"], rollout["response_mask"]], 1)
    with torch.no_grad():
        wrong = gpt2.policy(
            input_ids=ids, attention_mask=mask.long(), position_ids=torch.arange(ids.shape[1])[None]
        ).logits[:, -9:-1]
    assert (wrong.log_softmax(-1) - forward(gpt2, rollout)[0].log_softmax(-1)).abs().max() > 0.1


def test_a_row_scores_alone_what_it_scores_among_longer_rows(gpt2):
    # PITFALLS TOK-1, through the function that main calls, micro-batches of rows sorted by length included
    rollout = make_rollout([3, 9, 5, 1, 7], [8, 2, 5, 1, 6])
    logprobs, values = pf.response_logprobs_and_values(gpt2, rollout, 1.0, size=2)
    for i in range(5):
        alone = {name: x[i : i + 1] for name, x in rollout.items()}
        alone_logprobs, alone_values = pf.response_logprobs_and_values(gpt2, alone, 1.0, size=2)
        torch.testing.assert_close(alone_logprobs[0], logprobs[i], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone_values[0], values[i], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation_and_forward_agree(name):
    # PITFALLS TOK-1: greedy tokens from the cache are the argmax of a full forward, for rows padded by 0, 2
    # and 6 columns
    model = pf.PolicyAndCritic(causal_lm(name), torch.nn.Linear(32, 1)).eval()
    rollout = make_rollout([7, 5, 1], [8, 8, 8])
    responses = pf.generate(model.policy, rollout["queries"], rollout["query_mask"], 1, 8, 0.0, EOS)
    mask, _ = pf.stop_masks(responses, EOS, 0)
    logits, _ = forward(model, {**rollout, "responses": responses, "response_mask": mask})
    assert torch.equal(logits.argmax(-1)[mask], responses[mask])


def test_rows_that_stop_leave_the_others_as_they_are():
    # PITFALLS TOK-1: dropping finished rows from the cache must not mix rows up
    model = causal_lm("gpt2")
    rollout = make_rollout([4] * 12, [8] * 12)
    free = pf.generate(model, rollout["queries"], rollout["query_mask"], 1, 16, 0.0, -1)
    stop = int(free.flatten().mode().values)
    stopped = pf.generate(model, rollout["queries"], rollout["query_mask"], 1, 16, 0.0, stop)
    mask, has_stop = pf.stop_masks(free, stop, 0)
    assert has_stop.any() and len(set(mask.sum(1).tolist())) > 2
    assert torch.equal(stopped, free.masked_fill(~mask, 0))


def sampled(model, rows: list[list[int]], n: int, length: int) -> dict[str, torch.Tensor]:
    """A rollout of n samples to each row of ids."""
    queries, query_mask = pf.pad_left(rows, "cpu")
    generator = torch.Generator().manual_seed(0)
    responses = pf.generate(model, queries, query_mask, n, length, 1.0, EOS, 0, generator)
    mask, has_stop = pf.stop_masks(responses.clone(), EOS, 0)
    rollout = {"queries": queries.repeat_interleave(n, 0), "query_mask": query_mask.repeat_interleave(n, 0)}
    rollout |= {"responses": responses, "response_mask": mask, "score_mask": mask, "has_stop": has_stop}
    return rollout


def test_masks_come_from_lengths_not_from_ids():
    # PITFALLS TOK-2: 0 pads, and is a real token inside a prompt
    ids, mask = pf.pad_left([[0, 3, 0], [0]], "cpu")
    assert mask.tolist() == [[True, True, True], [False, False, True]] and mask.dtype == torch.bool
    assert ids.tolist() == [[0, 3, 0], [0, 0, 0]]


def test_the_stop_token_inside_a_prompt_is_read(gpt2):
    # PITFALLS TOK-2: prompts that contain EOS, which is all a tokenizer without pad token has to pad with
    rollout = sampled(gpt2.policy, [[3, EOS, 5, EOS], [EOS, 4]], 8, 6)
    logprobs, _ = pf.response_logprobs_and_values(gpt2, rollout, 1.0, 3)
    for i in (0, 8):
        query = rollout["queries"][i][rollout["query_mask"][i]]
        row = torch.cat([query, rollout["responses"][i, :1]])[None]
        with torch.no_grad():
            expected = gpt2.policy(row).logits[0, -2].log_softmax(-1)[row[0, -1]]
        assert len(query) == (4, 2)[i // 8] and logprobs[i, 0].item() == pytest.approx(
            expected.item(), abs=1e-5
        )


def test_ids_behind_the_stop_token_change_no_loss_metric_or_score(gpt2):
    # PITFALLS TOK-4
    rollout = make_rollout([3, 6, 4], [2, 8, 5])
    mask = rollout["response_mask"]
    advantages, returns = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(3)) * mask
    outcomes = []
    for responses in (
        rollout["responses"],
        torch.where(mask, rollout["responses"], torch.randint(VOCAB_SIZE, (3, 8))),
    ):
        changed = {**rollout, "responses": responses}
        logprobs, values = pf.response_logprobs_and_values(gpt2, changed, 1.0, 3)
        batch = {
            **changed,
            "logprobs": logprobs + 0.1,
            "values": values + 0.1,
            "advantages": advantages,
            "returns": returns,
            "loss_weights": pf.loss_weights(mask),
        }
        loss, stats, _ = pf.minibatch_loss(gpt2, pf.trim(batch, torch.arange(3)), SETTINGS)
        outcomes.append(
            (loss.detach(), stats, logprobs, values, pf.reward_model_scores(gpt2.critic, changed, 3))
        )
    assert all(torch.equal(a, b) for a, b in zip(*outcomes))


@pytest.mark.parametrize(
    "stop, after, lengths, found",
    [(9, 0, [2, 1, 4], [1, 1, 0]), (9, 2, [4, 3, 4], [1, 1, 0]), (-1, 0, [4, 4, 4], [0, 0, 0])],
)
def test_mask_ends_with_the_first_stop_token_at_or_after_stop_after(stop, after, lengths, found):
    # PITFALLS TOK-4, TOK-5: one id gives the mask and says whether a response was cut
    mask, has_stop = pf.stop_masks(torch.tensor([[7, 9, 1, 9], [9, 9, 9, 9], [1, 2, 3, 4]]), stop, after)
    assert torch.equal(mask, torch.arange(4) < torch.tensor(lengths)[:, None])
    assert has_stop.int().tolist() == found


def test_missing_stop_score_replaces_the_score_where_the_mask_has_no_stop_token(run, module):
    # PITFALLS TOK-5, GAE-7, GAE-9: reward 0.0 where the stop token is there, -2 exactly where it is not
    module("zero_reward", "def reward(prompts, responses, rows):\n    return [0.0] * len(responses)\n")
    settings = dict(reward="zero_reward:reward", stop_token="e", response_length=24, total_episodes=16)
    metrics, _ = run(**settings, noptepochs=1, missing_stop_score=-2.0)
    assert 0 < metrics[0]["objective/truncated"] < 1
    assert metrics[0]["objective/shaped_score"] == pytest.approx(-2 * metrics[0]["objective/truncated"])
    assert metrics[0]["objective/score"] == 0


def test_missing_stop_score_is_not_normalised(run, module):
    # PITFALLS RM-3: rewards of 7 and 3 become 1 and -1, but -2 stays -2
    module(
        "two_rewards",
        "def reward(prompts, responses, rows):\n    return [5.0 + 2 * (-1) ** i for i in range(len(rows))]\n",
    )
    settings = dict(reward="two_rewards:reward", stop_token="none", total_episodes=16, noptepochs=1)
    metrics, _ = run(**settings, normalize_reward=True, missing_stop_score=-2.0)
    assert metrics[0]["objective/shaped_score"] == -2 and metrics[0]["objective/truncated"] == 1


def test_reward_model_reads_the_ids_that_were_sampled(gpt2, monkeypatch):
    # PITFALLS TOK-6, RM-1: stop token included, nothing written over the end of a response that was cut by
    # its length
    rows = []

    def forward(model, ids, mask):
        rows.extend(row[m].tolist() for row, m in zip(ids, mask))
        return torch.zeros(ids.shape)

    rollout = sampled(gpt2.policy, [[3, 4], [5, 6, 7]], 8, 6)
    assert rollout["has_stop"].any() and not rollout["has_stop"].all()
    monkeypatch.setattr(pf.RewardModel, "forward", forward)
    pf.reward_model_scores(gpt2.critic, rollout, 100)
    expected = [
        query[m].tolist() + response[k].tolist()
        for query, m, response, k in zip(*(rollout[name] for name in list(rollout)[:4]))
    ]
    assert sorted(rows) == sorted(expected) and all(row[-1] == EOS or len(row) in (8, 9) for row in rows)


@pytest.mark.parametrize("bos", [True, False])
def test_one_bos_where_the_tokenizer_has_one(bos):
    # PITFALLS TOK-7: after plain text and after a chat template that writes BOS itself
    tokenizer = make_tokenizer(bos=bos)
    text = pf.encode_prompt(tokenizer, "add 1")
    chat = pf.encode_prompt(tokenizer, [{"role": "user", "content": "add 1"}])
    bos_id = tokenizer.convert_tokens_to_ids("<s>")
    assert text.count(bos_id) == chat.count(bos_id) == int(bos)
    assert tokenizer.decode(text, skip_special_tokens=True) == "add 1"
    assert tokenizer.decode(chat) == ("<s>" if bos else "") + "add 1<eos>="  # generation prompt at the end


def test_an_eos_that_the_tokenizer_adds_does_not_close_a_prompt():
    # one that the text holds stays
    tokenizer = make_tokenizer(bos=True)
    ends = [("<s>", tokenizer.bos_token_id), ("<eos>", EOS)]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A <eos>", special_tokens=ends)
    texts = ("ab", "ab<eos>", "")
    assert [tokenizer.decode(pf.encode_prompt(tokenizer, text)) for text in texts] == [
        "<s>" + t for t in texts
    ]


@pytest.mark.parametrize("cut, expected", [(False, ["xyz"]), (True, ["abc", "xyz"])])
def test_long_queries_are_dropped_or_cut_before_padding(tokenizer, cut, expected):
    # PITFALLS TOK-8: the cut keeps the start, as in lm-human-preferences; empty queries go
    rows = [{"prompt": "abcdef"}, {"prompt": "xyz"}, {"prompt": ""}]
    found = pf.encode_queries(tokenizer, rows, "prompt", 3, "prompts", cut)
    assert [tokenizer.decode(row["query_ids"]) for row in found] == expected


def test_dropping_every_query_is_refused(tokenizer):
    # PITFALLS TOK-8: never an empty batch
    with pytest.raises(SystemExit, match="--prompts.*--query_length 3"):
        pf.encode_queries(tokenizer, [{"prompt": "abcdef"}], "prompt", 3, "prompts")


def test_masks_are_bool():
    # PITFALLS TOK-9: an int mask would gather rows 0 and 1
    rollout = make_rollout([2, 3], [4, 1])
    batch = pf.trim(rollout, torch.arange(2))
    masks = [batch[name] for name in ("mask", "read_mask", "response_mask", "score_mask", "query_mask")]
    masks += pf.stop_masks(torch.ones(1, 2), 1, 0)
    assert {mask.dtype for mask in masks} == {torch.bool}


@pytest.mark.parametrize("side", ["left", "right"])
def test_reward_is_right_for_both_padding_sides(side):
    # PITFALLS TOK-10: the score of a row at its last token, whichever side the padding is on
    model, rows = reward_model(), [[3, 4, 5, 6, 7, 8], [9], [10, 11, 12]]
    padded = [[0] * (6 - len(row)) + row if side == "left" else row + [0] * (6 - len(row)) for row in rows]
    lengths = torch.tensor([[6], [1], [3]])
    mask = torch.arange(6) >= 6 - lengths if side == "left" else torch.arange(6) < lengths
    last = torch.full((3, 1), 5) if side == "left" else lengths - 1
    with torch.no_grad():
        found = model(torch.tensor(padded), mask).gather(1, last).squeeze(1)
        alone = torch.cat([model(*pf.pad_left([row], "cpu"))[:, -1] for row in rows])
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)


def test_trim_moves_all_padding_to_the_left():
    # PITFALLS TOK-10: 2 + 4 and 3 + 1 tokens become 6 columns, and response columns end where their row ends
    rollout = make_rollout([2, 5, 3], [4, 7, 1])
    batch = pf.trim(rollout, torch.tensor([0, 2]))
    assert batch["mask"].int().tolist() == [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]
    assert batch["response_mask"].int().tolist() == [[1, 1, 1, 1], [0, 0, 0, 1]]
    for row, i in ((0, 0), (1, 2)):
        response = rollout["responses"][i][rollout["response_mask"][i]]
        whole = torch.cat([rollout["queries"][i][rollout["query_mask"][i]], response])
        assert torch.equal(batch["query_responses"][row][batch["mask"][row]], whole)
        assert torch.equal(batch["responses"][row][batch["response_mask"][row]], response)


def test_trim_says_where_its_response_columns_came_from():
    # PITFALLS TOK-9
    rollout = make_rollout([2, 5, 3], [4, 7, 1])
    batch = pf.trim(rollout, torch.tensor([0, 2]))
    assert batch["columns"][0].tolist() == [0, 1, 2, 3] and batch["columns"][1, -1] == 0
    back = torch.zeros_like(rollout["responses"][[0, 2]]).scatter(
        1, batch["columns"], batch["responses"] * batch["response_mask"]
    )
    assert torch.equal(back, rollout["responses"][[0, 2]] * rollout["response_mask"][[0, 2]])


# ---------------------------------------------------------------- sampling and log-probabilities


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_cache_is_as_small_as_autocast_allows_and_gives_the_same_tokens(name, monkeypatch):
    # PITFALLS LP-7: rotary keys are float32 under autocast and would make the cache float32
    model, caches = causal_lm(name, seed=4), []
    queries = pf.pad_left([[1, 2], [3, 0, 2, 1]], "cpu")

    def kept(config, make=pf.growing_cache):
        caches.append(make(config))
        return caches[-1]

    def sampled():
        with torch.autocast("cpu", torch.bfloat16):
            return pf.generate(model, *queries, 3, 12, 1.0, -1, 0, torch.Generator().manual_seed(0))

    monkeypatch.setattr(pf, "growing_cache", kept)
    responses = sampled()
    assert {tensor.dtype for layer in caches[0].layers for tensor in (layer.keys, layer.values)} == {
        torch.bfloat16
    }
    monkeypatch.setattr(pf, "growing_cache", lambda config: DynamicCache(config=config))
    assert torch.equal(sampled(), responses)


def growing_layer():
    return pf.growing_cache(causal_lm("gpt2").config).layers[0]


def test_a_token_is_written_behind_the_others_which_are_not_copied():
    layer, dynamic = growing_layer(), DynamicLayer()
    generator, places = torch.Generator().manual_seed(0), []
    for columns in (5, 1, 1, 1, 1):  # room for 7 columns at first, then for 12
        keys, values = (torch.randn(3, 2, columns, 4, generator=generator) for _ in range(2))
        expected = dynamic.update(keys, values)
        assert all(torch.equal(a, b) for a, b in zip(layer.update(keys, values), expected))
        places.append(layer.keys.data_ptr())
    assert len(set(places[:3])) == len(set(places[3:])) == 1 and places[2] != places[3]


@pytest.mark.parametrize("rows", [[0, 0, 1, 1, 2, 2], [2, 0], [1]])
def test_repeated_and_cut_rows_go_on_alike(rows):
    layer, dynamic, generator = growing_layer(), DynamicLayer(), torch.Generator().manual_seed(0)
    for cache in (layer, dynamic):
        generator.manual_seed(0)
        cache.update(*(torch.randn(3, 2, 5, 4, generator=generator) for _ in range(2)))
        cache.reorder_cache(torch.tensor(rows))
        for _ in range(4):
            cache.update(*(torch.randn(len(rows), 2, 1, 4, generator=generator) for _ in range(2)))
    assert torch.equal(layer.keys, dynamic.keys) and torch.equal(layer.values, dynamic.values)


def test_gelu_of_gpt2_is_its_fused_form(tmp_path):
    model = causal_lm("gpt2", activation_function="gelu_new", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model.save_pretrained(tmp_path)
    loaded = pf.load_causal_lm(str(tmp_path)).eval()
    assert loaded.config.activation_function == "gelu_pytorch_tanh"
    ids = torch.arange(20).view(2, 10)
    assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)


@pytest.fixture(scope="module")
def five():
    """A GPT-2 over five tokens whose checkpoint defaults would ruin sampling, and a batch of one padded and
    one longer query."""
    model = causal_lm("gpt2", seed=3, vocab_size=5, eos_token_id=4, bos_token_id=4)
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, top_p=0.1, temperature=0.01, repetition_penalty=9.0, eos_token_id=0
    )
    return model, *pf.pad_left([[1, 2], [3, 0, 2, 1]], "cpu")


def enumerate_pairs(model, query, temperature):
    """P(first, second) over all 25 two-token responses, one unpadded forward per prefix."""
    with torch.no_grad():
        first = (model(torch.tensor([query])).logits[0, -1] / temperature).softmax(-1)
        second = [
            (model(torch.tensor([query + [a]])).logits[0, -1] / temperature).softmax(-1) for a in range(5)
        ]
    return torch.stack([first[a] * second[a] for a in range(5)]).double()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_follow_softmax_whatever_the_checkpoint_defaults_say(five, temperature):
    # PITFALLS LP-1, LP-4: chi-square of 4000 two-token samples against the enumerated distribution; p = 1e-3
    # with a fixed seed
    model, queries, query_mask = five
    generator = torch.Generator().manual_seed(0)
    responses = pf.generate(model, queries, query_mask, 4000, 2, temperature, -1, 0, generator)
    for responses, query in zip(responses.split(4000), ([1, 2], [3, 0, 2, 1])):
        expected = enumerate_pairs(model, query, temperature).flatten() * 4000
        observed = (responses * torch.tensor([5, 1])).sum(1).bincount(minlength=25).double()
        rare = expected < 5
        expected, observed = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (expected, observed))
        assert len(expected) > 8, "a nearly deterministic model would test nothing"
        expected, observed = expected[expected > 0], observed[expected > 0]
        expected *= observed.sum() / expected.sum()
        assert chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-3


def test_nothing_can_warp_the_samples():
    # PITFALLS LP-4: there is no top-k, top-p, minimum length or repetition penalty to set
    names = {f.name for f in dataclasses.fields(pf.Args)} | set(inspect.signature(pf.generate).parameters)
    words = ("top_k", "top_p", "min_length", "min_new", "repetition")
    assert [name for name in names if any(word in name for word in words)] == []


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_equal_enumeration_on_a_five_token_vocabulary(five, temperature):
    # PITFALLS LP-9, LP-2, LP-3: logits at t score token t+1, with the temperature of the sampler
    model, queries, query_mask = five
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    for i, query in enumerate(([1, 2], [3, 0, 2, 1])):
        rollout = {
            "queries": queries[i].expand(25, -1),
            "query_mask": query_mask[i].expand(25, -1),
            "responses": pairs,
            **dict.fromkeys(("response_mask", "score_mask"), torch.ones_like(pairs, dtype=torch.bool)),
        }
        logprobs, _ = pf.response_logprobs_and_values(model, rollout, temperature, 7)
        torch.testing.assert_close(
            logprobs.sum(1).exp().view(5, 5).double(),
            enumerate_pairs(model, query, temperature),
            atol=1e-6,
            rtol=0,
        )


def test_a_value_belongs_to_the_state_before_its_token():
    # PITFALLS LP-9: values[t] may depend on tokens before t alone
    model = pf.PolicyAndCritic(causal_lm("gpt2"), reward_model()).eval()
    rollout = make_rollout([4], [6], response_width=6)
    _, values = forward(model, rollout)
    changed = rollout["responses"].clone()
    changed[0, 3] = (changed[0, 3] + 1) % EOS
    _, new_values = forward(model, {**rollout, "responses": changed})
    assert torch.equal(values[0, :4], new_values[0, :4]) and (values[0, 4:] != new_values[0, 4:]).all()


def test_values_are_read_one_column_earlier_than_their_token():
    # PITFALLS LP-9, RM-4: value of token t = critic at column Q + t - 1
    model = pf.PolicyAndCritic(causal_lm("gpt2"), reward_model()).eval()
    rollout = make_rollout([4], [6], response_width=6)
    ids, mask = torch.cat([rollout["queries"], rollout["responses"]], 1), torch.ones(1, 10, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(forward(model, rollout)[1], model.critic(ids, mask)[:, 3:9])


def test_shared_head_reads_the_policy_hidden_states():
    # PITFALLS LP-9: the shared critic has the same offset
    policy = causal_lm("gpt2")
    model = pf.PolicyAndCritic(policy, torch.nn.Linear(32, 1)).eval()
    rollout = pad_more(make_rollout([4], [6], response_width=6), 3)
    ids = torch.cat([rollout["queries"], rollout["responses"]], 1)[:, 3:]
    with torch.no_grad():
        hidden = policy.transformer(ids).last_hidden_state
        torch.testing.assert_close(
            forward(model, rollout)[1], model.critic(hidden).squeeze(-1)[:, 3:9], atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_ratio_is_one_and_kl_is_zero_before_any_update(temperature):
    # PITFALLS LP-3: policy, old policy and reference divide by the same temperature
    model = pf.PolicyAndCritic(causal_lm("gpt2"), reward_model()).eval()
    rollout = make_rollout([3, 6, 2], [8, 3, 5])
    logprobs, values = pf.response_logprobs_and_values(model, rollout, temperature, 2)
    ref_logprobs, _ = pf.response_logprobs_and_values(causal_lm("gpt2"), rollout, temperature, 2)
    assert torch.equal(logprobs, ref_logprobs) and (logprobs[rollout["response_mask"]] != 0).all()
    rollout |= {"logprobs": logprobs, "values": values, "advantages": values, "returns": values}
    rollout["loss_weights"] = pf.loss_weights(rollout["response_mask"])
    args = dataclasses.replace(SETTINGS, temperature=temperature)
    _, stats, _ = pf.minibatch_loss(model, pf.trim(rollout, torch.arange(3)), args)
    assert stats[pf.STATS.index("ppo/policy/ratio")].item() == pytest.approx(1, abs=1e-5)
    assert stats[pf.STATS.index("ppo/policy/approxkl")].item() < 1e-10


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_no_dropout_in_any_model_of_ppo(world, name):
    # PITFALLS LP-6: the checkpoint's configuration asks for 0.1
    policy = pf.load_causal_lm(str(world / name)).train()
    assert not [m for m in policy.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    ids = torch.arange(12).view(1, 12)
    assert torch.equal(policy(ids).logits, policy(ids).logits)
    reward = pf.load_reward_model(str(world / "reward")).train()
    assert not [m for m in reward.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    assert torch.equal(reward(ids, ids >= 0), reward(ids, ids >= 0))


def test_logprobs_and_entropy_are_computed_in_float32():
    # PITFALLS LP-7: from bfloat16 logits, and under bfloat16 autocast
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)) * 8
    tokens, mask = torch.randint(50, (2, 3)), torch.ones(2, 3, dtype=torch.bool)
    low = logits.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, entropy = pf.token_logprobs(low, tokens, mask, 0.6), pf.token_entropy(low, 0.6)
    exact = (low.double() / 0.6).log_softmax(-1)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(
        logprobs.double(), exact.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_values_and_scores_are_float32_under_autocast(critic):
    # PITFALLS LP-7: a bfloat16 head would round values to two or three digits
    model = pf.PolicyAndCritic(
        causal_lm("gpt2"), reward_model() if critic == "separate" else torch.nn.Linear(32, 1)
    ).eval()
    rollout = make_rollout([4, 2], [6, 3])
    with torch.autocast("cpu", torch.bfloat16):
        _, values = forward(model, rollout)
        scores = pf.reward_model_scores(reward_model(), rollout, 2)
    assert values.dtype == scores.dtype == torch.float32
    assert all((x != x.bfloat16().float()).any() for x in (values, scores))


def test_gathered_logprobs_equal_the_naive_formula_with_gradients():
    # PITFALLS LP-8
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 9, generator=generator, requires_grad=True)
    tokens, mask = (
        torch.randint(9, (2, 4), generator=generator),
        torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool(),
    )
    weights = torch.randn(2, 4, generator=generator)
    naive = ((logits / 0.7).log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)) * mask
    ours = pf.token_logprobs(logits, tokens, mask, 0.7)
    torch.testing.assert_close(ours, naive, atol=1e-6, rtol=0)
    ours_gradient, naive_gradient = (
        torch.autograd.grad((x * weights).sum(), logits)[0] for x in (ours, naive)
    )
    torch.testing.assert_close(ours_gradient, naive_gradient, atol=1e-6, rtol=0)


def test_sampling_differs_over_copies_updates_and_ranks_and_repeats_for_a_key():
    # PITFALLS LP-10
    model, rollout = causal_lm("gpt2"), make_rollout([4], [8])

    def draw(*key):
        generator = pf.random_generator("cpu", *key)
        return pf.generate(model, rollout["queries"], rollout["query_mask"], 6, 8, 1.0, -1, 0, generator)

    first = draw(1, 3, 1, 0)
    assert len({tuple(row) for row in first.tolist()}) == 6, "the N copies of a prompt"
    assert torch.equal(first, draw(1, 3, 1, 0))
    for other in ((1, 3, 1, 1), (1, 3, 2, 0), (2, 3, 1, 0)):  # another rank, update, seed
        assert not torch.equal(first, draw(*other))


def test_prompts_come_in_shuffled_passes():
    # PITFALLS LP-10: data order is shared by all ranks, and each pass holds every prompt once
    order = pf.prompt_order(5, 0, 15, seed=1)
    assert [sorted(order[i : i + 5]) for i in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3
    assert order[:5] != order[5:10] or order[5:10] != order[10:]
    assert pf.prompt_order(5, 0, 15, seed=1, reshuffle=False) == order[:5] * 3  # LMHP-details: shuffled once
    assert pf.prompt_order(5, 3, 4, seed=1) == order[3:7] and pf.prompt_order(5, 0, 15, seed=2) != order
