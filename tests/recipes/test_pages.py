"""Pages that map flags: every flag of ours exists, and every flag of the others has its line."""

import dataclasses
import importlib
import re
from pathlib import Path

import pfppo_single as pf

PAGE = (Path(__file__).resolve().parents[2] / "benchmark/pages/coming_from.md").read_text("utf-8")
LAUNCHER = {"multi_gpu", "num_processes", "mixed_precision"}  # of accelerate launch
FIELDS = {field.name for field in dataclasses.fields(pf.Args)}

PPO_CONFIG = """
    learning_rate dataset_num_proc num_mini_batches total_episodes local_rollout_forward_batch_size
    num_sample_generations response_length stop_token stop_token_id temperature missing_eos_penalty
    sft_model_path world_size num_total_batches micro_batch_size local_batch_size batch_size
    local_mini_batch_size mini_batch_size
    push_to_hub reward_model_path model_adapter_name ref_adapter_name num_ppo_epochs whiten_rewards kl_coef
    kl_estimator cliprange vf_coef cliprange_value gamma lam ds3_gather_for_generation
"""  # trl 1.12.0, trl/experimental/ppo/ppo_config.py
OPENRLHF = """
    pretrain reward_pretrain save_path micro_train_batch_size train_batch_size micro_rollout_batch_size
    rollout_batch_size max_epochs prompt_max_len generate_max_len zero_stage bf16 actor_learning_rate
    critic_learning_rate init_kl_coef prompt_data input_key apply_chat_template max_samples normalize_reward
    adam_offload flash_attn gradient_checkpointing use_wandb
"""


def table_rows(text: str) -> list[list[str]]:
    rows = [line.strip().strip("|").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if "---" not in row[0]]


def test_every_flag_of_ours_exists():
    rows = table_rows(PAGE)
    assert len(rows) > 60 and all(len(row) in (2, 3) for row in rows)
    ours = [flag for row in rows for flag in re.findall(r"--(\w+)", row[1])]
    assert len(ours) > 40 and not set(ours) - FIELDS
    for row in rows:
        remark = re.sub(r"`wandb .*?`|`--\w+[^`]*` of accelerate", "", " ".join(row[2:]))
        assert not set(re.findall(r"--(\w+)", remark)) - FIELDS, row
        assert row[1] in ("none", "here") or row[1].startswith("`--"), row


def test_commands_are_taken(tmp_path):
    blocks = re.findall(r"accelerate launch [^\n]*pfppo_single\.py.*?(?=\n\n)", PAGE, re.S)
    assert len(blocks) == 2
    for block in blocks:
        flags = block.replace("\\\n", " ").partition("pfppo_single.py")[2].split()
        pf.check_args(pf.parse_args(pf.Args, flags), int(re.search(r"--num_processes (\d+)", block)[1]))


def test_the_command_after_trls_sets_what_differs_by_default():
    rows = [row for row in table_rows(PAGE) if re.search(r"by default, \S+ in TRL", row[-1])]
    differing = {re.search(r"--(\w+)", row[1])[1] for row in rows} - {
        "gradient_checkpointing"
    }  # memory alone
    command = PAGE.partition("The same algorithm here")[2].partition("\n\nOpenRLHF")[0]
    assert differing == {"temperature", "kl_coef", "lr_schedule", "eps"}
    assert not differing - set(re.findall(r"--(\w+)", command))


def test_every_flag_of_the_others_has_a_line():
    trl, _, openrlhf = PAGE.partition("## OpenRLHF")
    named = {name for row in table_rows(trl) for name in re.findall(r"`(\w+)`", row[0])}
    assert not set(PPO_CONFIG.split()) - named
    named = {name for row in table_rows(openrlhf) for name in re.findall(r"`--(\w+)`", row[0])}
    assert not set(OPENRLHF.split()) - named


def test_commands_of_the_baselines_are_taken():
    page = (Path(__file__).resolve().parents[2] / "benchmark/pages/baselines.md").read_text("utf-8")
    block = page.partition("<!-- commands: baselines -->\n```\n")[2].partition("```")[0]
    lines = block.replace("\\\n", " ").strip().splitlines()
    assert len(lines) == 6
    for line in lines:
        module, *flags = line.removeprefix("python -m ").split()
        args = pf.parse_args(importlib.import_module(module).Args, flags)
        assert args.output_dir.startswith("output/")
