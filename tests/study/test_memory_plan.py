"""The memory plan: counted by hand where that is possible, and the same as real tensors need."""

import dataclasses

import pytest
import torch
from conftest import VOCAB_SIZE, causal_lm, model_config

import pfppo_single as pf
import rm_single as rm
import sft_single as sft
from benchmark import memory_plan as mp
from benchmark.study import simulate

# the Llama of tiny.py: 2 layers x (2 x 32 x 32 + 2 x 32 x 16 + 3 x 32 x 48 + 2 x 32) + 2 x 43 x 32 + 32
LLAMA = 2 * (2 * 1024 + 2 * 512 + 3 * 1536 + 64) + 2 * VOCAB_SIZE * 32 + 32
OUTPUT = VOCAB_SIZE * 32  # the output layer, which a reward model lacks


def plan(script="pfppo", model="llama", world=1, bf16=False, **flags) -> simulate.Plan:
    lengths = dict(query_length=5, response_length=7) | flags
    sizes = dict(vocab_size=lengths.pop("vocab", VOCAB_SIZE))
    if "layers" in lengths:
        sizes |= dict(num_hidden_layers=lengths.pop("layers"))
    config = model_config(model, **sizes, **{"attention_dropout": 0.0} if model == "llama" else {})
    if script == "sft":
        args = sft.Args(train_data="-", **lengths)
    elif script == "rm":
        args = rm.Args(model="-", train_data="-", **lengths)
    else:
        args = pf.Args(**{"policy": "-", "reward": "-", "prompts": "-", **lengths})
    return mp.make_plan(script, args, config, world=world, bf16=bf16)


def test_state_is_weights_gradients_and_two_moments():
    found = mp.state(plan("sft"), "train")
    assert found == {"weights": 4 * LLAMA, "gradients": 4 * LLAMA, "adam": 8 * LLAMA, "frozen": 0}


def test_state_of_ppo_holds_four_models():
    found = mp.state(plan(), "generate")
    assert found["weights"] == 4 * (2 * LLAMA - OUTPUT + 32 + 3)  # critic: head, its bias, gain and bias
    assert found["frozen"] == found["weights"] and found["gradients"] == 0


def test_frozen_weights_take_half_under_bf16():
    assert mp.state(plan(bf16=True), "score")["frozen"] * 2 == mp.state(plan(), "score")["frozen"]


def test_reward_function_and_shared_critic_need_no_models_of_their_own():
    found = mp.state(plan(reward="module:function", critic="shared"), "score")
    assert found["weights"] == 4 * (LLAMA + 33) and found["frozen"] == 4 * LLAMA


def test_tied_embeddings_are_counted_once():
    model = causal_lm("gpt2")
    assert mp.numbers(model) == sum(x.numel() for x in model.parameters())


def test_ranks_share_state_only_when_sharded():
    whole, shared = (mp.state(plan("sft", world=2, shard=shard), "train") for shard in (False, True))
    assert all(shared[name] * 2 == whole[name] for name in whole)


def test_ddp_keeps_gradients_between_the_phases():
    kept = [mp.state(plan("sft", world=2, shard=shard), "evaluate")["gradients"] for shard in (False, True)]
    assert kept == [4 * LLAMA, 0]


def test_sampling_gathers_a_whole_policy():
    assert mp.gathered(plan(world=2, shard=True), "generate") == 4 * LLAMA
    assert mp.gathered(plan(world=2, shard=True, bf16=True), "generate") == 2 * LLAMA
    assert mp.gathered(plan(world=2), "generate") == 0


def test_training_gathers_blocks_and_what_is_outside_of_them():
    block = (LLAMA - 2 * OUTPUT - 32) // 2
    found = mp.gathered(plan("sft", world=2, shard=True), "train")
    assert found == 4 * (2 * OUTPUT + 32 + 3 * block) + 4 * block


def test_cache_holds_grouped_heads_and_room_to_grow():
    # 2 layers x keys and values x 10 rows x 2 heads x 8 numbers x 15 columns x 4 bytes: room for 5 queries and a
    # token is 9, then 15
    found = simulate.simulate(plan(stop_token="none", num_responses=5), "generate", 10)
    assert found["cache"] == 2 * 2 * 10 * 2 * 8 * 15 * 4


@pytest.mark.parametrize("n", [1, 3])
def test_columns_are_those_of_the_cache_itself(n):
    layer, rows = pf.growing_cache(model_config("gpt2")).layers[0], torch.zeros(2, 1, 1, 4)
    layer.update(rows.expand(2, 1, 11, 4), rows.expand(2, 1, 11, 4))
    if n > 1:
        layer.reorder_cache(torch.arange(2).repeat_interleave(n))
    for _ in range(40):
        layer.update(rows.repeat(n, 1, 1, 1), rows.repeat(n, 1, 1, 1))
    assert layer.keys.stride(1) // 4 == simulate.columns(11, 40, n)


def test_logits_are_counted_with_the_exponentials_of_logsumexp():
    found = simulate.simulate(plan("sft", vocab=3000), "evaluate", 3)
    assert found["logits"] == 4 * 3 * (8 + 7) * 3000  # float32, 3 rows; 8 columns, of which 7 are used


def test_fake_tensors_count_as_real_ones():
    # one training micro-batch of the script's own functions, with weights that exist
    made, model = plan("sft", "gpt2"), causal_lm("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    made = dataclasses.replace(made, config=model.config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    rows = [{"query_ids": [1] * (4 + (i > 0)), "response_ids": [2] * 7} for i in range(4)]  # one is padded
    live = simulate.Live(VOCAB_SIZE, model)
    with live:
        loss = sft.response_logprobs(model.train(), rows, "cpu").sum()
        live.backward = True
        loss.backward()
    planned = simulate.simulate(made, "train", 4)
    assert planned.total() == pytest.approx(live.peak.total(), rel=0.02)


def test_a_tensor_that_is_gone_is_not_counted():
    live = simulate.Live(VOCAB_SIZE)
    with live:
        for _ in range(3):
            torch.zeros(1000)
    assert (live.peak.total(), live.now.total()) == (4000, 0)


def test_checkpointing_lowers_activations_only():
    args = dict(script="sft", model="gpt2", response_length=40)
    plain, less = (mp.phase_memory(plan(**args, gradient_checkpointing=x), "train", 8) for x in (False, True))
    assert less["activations"] < 0.8 * plain["activations"] and less["weights"] == plain["weights"]


def test_autocast_copies_of_weights_are_counted():
    # in bfloat16, while the phase lasts: all matrices but the embedding, no norms
    found = simulate.simulate(plan("sft", vocab=3000, bf16=True), "evaluate", 4)
    assert found["copies"] == 2 * (LLAMA - 2 * OUTPUT - 5 * 32 + 3000 * 32)


def test_largest_sizes_fit_and_more_do_not():
    made, room = plan(batch_size=1024, minibatch_size=1024, layers=1, critic="shared"), 5e6
    for size, rows in mp.largest(made, room).items():
        phases, step = [phase for phase, other in mp.PHASES["pfppo"].items() if other == size], rows // 20
        needs = [
            max(mp.phase_memory(made, phase, count).total() for phase in phases)
            for count in (rows, rows + 5 * step)
        ]
        assert 0.98 * room < needs[0] < 1.01 * room < needs[1]


def test_last_line_says_what_to_lower():
    made = plan("sft", world=2, layers=1)
    text = mp.last_line(made, 1e-4)
    assert "too much" in text and "--shard on more processes" in text and "\n" not in text
    assert mp.last_line(made, 80).endswith("it fits")


@pytest.mark.parametrize("script", mp.PHASES)
def test_every_phase_of_every_script_has_a_row(script):
    sizes = dict(forward_batch_size=4, batch_size=8, micro_batch_size=4)
    if script == "pfppo":
        sizes |= dict(batch_size=2, num_responses=4, minibatch_size=8)
    text = mp.report(plan(script, world=2, bf16=True, shard=True, layers=1, **sizes), 80)
    assert [phase for phase in ("loading", *mp.PHASES[script], "save") if f"| {phase} |" not in text] == []


@pytest.mark.parametrize("command", [["benchmark/memory_plan.py"], ["-m", "benchmark.memory_plan"]])
def test_command_works_as_file_and_as_module(command, forks, tmp_path):
    model_config("llama", num_hidden_layers=1).save_pretrained(tmp_path)
    flags = "--script sft --processes 2 --gpu_gb 80 --shard --query_length 5 --response_length 7".split()
    flags += "--forward_batch_size 4 --batch_size 8 --micro_batch_size 4".split()
    command = [*command, "--policy", str(tmp_path), *flags]
    (printed,) = forks("fork_server", "run_command", command, folder=tmp_path / "log")["printed"]
    assert printed.splitlines()[-1].endswith("it fits"), printed
