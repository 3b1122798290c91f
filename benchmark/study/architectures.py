"""Tries every causal language model of transformers, tiny and from a seed: do the scripts work on it, or say
that they do not?

    python -m benchmark.study.architectures --output_dir DIR
    python -m benchmark.study.architectures --only llama mamba --output_dir DIR

Each architecture runs in a process of its own with a limit of time and memory. A line goes to
DIR/architectures.jsonl when it is done, so the same command goes on where it was stopped; DIR/table.md is
written at the end. For each one:

  build    its default configuration, shrunk by rule (RULES, EXCEPTIONS), random weights, saved and loaded
  checks   check_model and check_cache as pfppo_single.py runs them, a pass or a message
  truth    what the checks are to find, found without them: greedy tokens of `generate` against a full forward
           of each row alone, without cache and padding; log-probabilities likewise; train against eval mode
  critics  one PPO minibatch forward and backward, with a separate and with a shared critic
  reward   scores against those of each row alone; saved as rm_single.py does, loaded as pfppo_single.py does,
           and by plain transformers
"""

import contextlib
import io
import json
import multiprocessing
import re
import resource
import signal
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import tyro
from accelerate import Accelerator
from tokenizers import Tokenizer, models
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

import pfppo_single as pf
import rm_single as rm
from benchmark import records

VOCAB, ROWS, LENGTH = 43, [[5, 9, 14, 22, 31, 8, 17, 26, 11], [12, 30, 7], [40, 6, 19, 33, 25, 10]], 8

BOUND = 2e-3  # largest difference that is rounding, in standard deviations of what is compared
COLUMNS = ("policy", "separate critic", "shared critic", "reward model")
ACCELERATOR = Accelerator(cpu=True)


@dataclass
class Args:
    output_dir: str
    """folder for architectures.jsonl and table.md; lines that are there are kept"""
    only: tuple[str, ...] = ()
    """names of the table, model types of transformers; none: all"""
    seconds: int = 20
    """limit of processor time for one architecture; of the clock six times this"""
    gigabytes: int = 6
    """memory limit of one architecture, above what the imports take"""


# The first pattern that matches a field's name gives the largest value that it keeps
RULES = (
    (
        r"token_id$|_id$|_index$|pretraining|chunk_size_feed|num_nextn|index_(topk|block|local)|keep_window",
        None,
    ),
    (r"type_vocab|type_vocab_size|functions|kernel|conv_L_cache|d_conv", 4),
    (r"vocab", VOCAB),
    (r"topk_group|n_groups?$|ngroups|expert_group|shared_experts?$|zero_expert", 1),
    (r"top_?k$|experts_per_tok|moe_k$", 2),
    (r"experts.*(intermediate|size|dim)", 32),
    (r"experts|expert_num", 4),
    (r"(key_value|kv|key|mamba)_heads|query_groups", 2),
    (r"n_heads?$|(^|_)heads$|heads_per_ngram", 4),
    (r"qk_head_dim", 16),
    (r"head_?dim|head_size|d_head|dim_head|kv_channels|rotary_dim", 8),
    (r"sliding_window$|window_(size|len)|attention_chunk_size|local_attention$", 8),
    (r"d_state|state_size|chunk_?(size|length)|block_size|rel_extent|(axial_)", 8),
    (r"rank", 16),
    (r"max_.*position|n_positions|n_ctx|max_seq_len|context_length|model_max_length|relative_max", 128),
    (r"intermediate|ffn|dim_ff|dff|inner|feed_forward|(mlp|mid)_dim", 32),
    (r"hidden_(size|dim)|d_model|n_embd|embed_dim|emb_dim|embedding_(size|dim)", 32),
    (r"width|proj_(size|dim)|d_ssm|adapter_(in|out)", 32),
    (r"^((num|encoder|decoder|num_encoder|num_decoder|num_hidden|n)_)?(layers?|blocks)$|per_stack", 2),
)
# Where the rules fail: fields set by hand, of a model type or of a part of one
EXCEPTIONS: dict[str, dict] = {
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": None,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {
        "num_hidden_layers": 4,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "layer_types": ["indexed_attention", "sliding_attention"],
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_rope_head_dim": 8,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "emu3": {"pad_token_id": 1},
    "emu3_text_model": {"pad_token_id": 1},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": [32] * 4,
        "activation_sparsity_pattern": [0.95, 0.0] * 2,
    },
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": None},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "modernbert-decoder": {"pad_token_id": 1},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 2048,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16]},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16, "n_mamba_heads": 8, "mamba_headdim": 8},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
}
# The same architecture with a setting that changes the answer: name in the table -> model type, fields
VARIANTS: dict[str, tuple[str, dict]] = {
    "bert, not as a decoder": ("bert", {"is_decoder": False}),
    "deepseek_v32, rows longer than index_topk": ("deepseek_v32", {"index_topk": 4}),
    "doge, rows longer than keep_window_size": ("doge", {"keep_window_size": 8}),
    "llama4, no attention in chunks": ("llama4_text", {"attention_chunk_size": 128}),
    "mixtral, router jitter": ("mixtral", {"router_jitter_noise": 0.3}),
    "opt, projected embeddings": ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "opt, layer drop": ("opt", {"layerdrop": 0.5}),
    "phi3, longrope beyond its first length": (
        "phi3",
        {
            "original_max_position_embeddings": 12,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
                "partial_rotary_factor": 1.0,
            },
        },
    ),
    "phi3, longrope within its first length": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
                "partial_rotary_factor": 1.0,
            },
        },
    ),
}


def shrunk(name: str, value):
    """A field's value in the tiny configuration."""
    if isinstance(value, list | tuple):
        return type(value)(shrunk(name, item) for item in value)
    if isinstance(value, int) and not isinstance(value, bool):
        limit = next((limit for pattern, limit in RULES if re.search(pattern, name)), None)
        return value if limit is None else min(value, limit)
    return value


def tiny_fields(default) -> dict:
    """Fields of a configuration, shrunk. Of a list with an entry for each layer the distinct entries stay, so
    that every kind of layer is tried."""
    fields, sub = {}, getattr(default, "sub_configs", {})
    values = {
        name: value
        for name, value in default.to_dict().items()
        if name not in ("model_type", "id2label", "label2id")
    }
    depth = getattr(default, "num_hidden_layers", None) or 0
    patterns = {n: v for n, v in values.items() if isinstance(v, list) and depth and len(v) == depth}
    kinds = {name: sorted(set(v), key=v.index) for name, v in patterns.items() if isinstance(v[0], str)}
    layers = max([2, *map(len, kinds.values())])
    for name, value in values.items():
        if name == "num_key_value_heads" and "kv_lora_rank" in values:  # latent attention has as many
            fields[name] = 4
        elif name in sub:
            child = getattr(default, name)
            if child is not None:
                fields[name] = type(child)(**tiny_fields(child) | EXCEPTIONS.get(child.model_type, {}))
        elif name in kinds:
            fields[name] = (kinds[name] + [kinds[name][-1]] * layers)[:layers]
        elif name in patterns:
            fields[name] = shrunk(name, value)[:layers]
        elif isinstance(value, int | float | list | tuple) and not isinstance(value, bool):
            small = shrunk(name, value)
            if re.search(RULES[-1][0], name):
                small = min(value, layers)
            if small != value:
                fields[name] = small
    if values.get("is_decoder") is False:  # of a masked language model, as a causal one
        fields["is_decoder"] = True
    for name, value in values.items():  # tokens that the tiny vocabulary has not
        if name.endswith(("token_id", "_index")) and isinstance(value, int) and value >= VOCAB:
            fields[name] = None if name == "pad_token_id" else 2
        if name.endswith("token_id") and isinstance(value, list):
            fields[name] = [2]
    return fields


def tiny_config(name: str):
    """The configuration of a name in the table."""
    kind, changes = VARIANTS.get(name, (name, {}))
    fields = tiny_fields(CONFIG_MAPPING[kind]()) | EXCEPTIONS.get(kind, {}) | changes
    return CONFIG_MAPPING[kind](**fields)


def save_tiny(name: str, folder: str) -> dict:
    """Saves the model of a name and a tokenizer of as many tokens -> what the table says of it. Noise on all
    weights: those that start at 0 or 1 hide what they do."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(name))
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return {"class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())}


def tiny_tokenizer():
    ids = {f"t{i}": i for i in range(VOCAB)}
    inner = Tokenizer(models.WordLevel(ids, unk_token="t0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="t2", unk_token="t0")


def check_message(function, *arguments) -> dict:
    """What a check of the scripts says: {} if it passes; an error that is no SystemExit is no message."""
    try:
        function(*arguments)
    except SystemExit as error:
        lines = str(error).strip().splitlines() or [""]
        return {"message": str(error)} if len(lines) == 1 else {"message": str(error), "lines": len(lines)}
    except Exception as error:
        return {"error": short(error)}
    return {}


def short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


@torch.no_grad()
def alone(model, ids: list[int]) -> torch.Tensor:
    """Logits (T, V) of one row without padding, cache or positions of ours."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def greedy_truth(model, row: list[int], stop: int) -> tuple[list[int], list[torch.Tensor]]:
    """Greedy continuation by full forwards of the row alone, and the logits of each step."""
    ids, steps = list(row), []
    for _ in range(LENGTH):
        steps.append(alone(model, ids)[-1])
        ids.append(int(steps[-1].argmax()))
        if ids[-1] == stop:
            break
    return ids[len(row) :], steps


def same_tokens(model, responses: torch.Tensor, stop: int) -> bool:
    """Whether responses (rows * 2, LENGTH) of `generate` are those of greedy_truth, but for near ties."""
    for i, response in enumerate(responses.tolist()):
        tokens, steps = greedy_truth(model, ROWS[i // 2], stop)
        for token, right, logits in zip(response, tokens, steps):
            if token != right:
                if logits.max() - logits[token] > 1e-3 * logits.std():
                    return False
                break
        else:
            if any(response[len(tokens) :]):
                return False
    return True


def make_rollout(responses: torch.Tensor, stop: int) -> dict[str, torch.Tensor]:
    """A rollout as `sample_rollout` gives it."""
    queries, mask = pf.pad_left(ROWS, "cpu")
    score_mask, has_stop = pf.stop_masks(responses, stop, 0)
    rollout = {"queries": queries.repeat_interleave(2, 0), "query_mask": mask.repeat_interleave(2, 0)}
    rollout |= {"responses": responses, "response_mask": score_mask, "score_mask": score_mask}
    return rollout | {"has_stop": has_stop}


def real_rows(rollout: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """Query and response of each row of a rollout, without padding."""
    names = (("queries", "query_mask"), ("responses", "response_mask"))
    parts = [[x[m].tolist() for x, m in zip(rollout[ids], rollout[mask])] for ids, mask in names]
    return list(zip(*parts))


def policy_truth(model) -> tuple[dict, dict[str, torch.Tensor]]:
    """What training relies on, each a number or a truth value -> and a rollout in which rows stop early."""
    queries, mask = pf.pad_left(ROWS, "cpu")
    model.eval()
    steps, sampled = [], 0.0
    hook = model.register_forward_hook(lambda *call: steps.append(call[-1].logits[:, -1]))
    greedy = pf.generate(model, queries, mask, 2, LENGTH, 0.0, -1)
    hook.remove()
    steps = torch.stack([steps[0].repeat_interleave(2, 0), *steps[1:]], 1).float()
    for i, response in enumerate(greedy.tolist()):
        row = ROWS[i // 2]
        right = torch.stack([alone(model, row + response[:t])[-1] for t in range(LENGTH)])
        sampled = max(sampled, ((steps[i] - right).abs().max() / right.std()).item())
    truth = {"sampled": sampled, "greedy": same_tokens(model, greedy, -1)}
    stop = greedy_truth(model, ROWS[1], -1)[0][2]
    stopped = pf.generate(model, queries, mask, 2, LENGTH, 0.0, stop)
    truth["greedy, rows leave early"] = same_tokens(model, stopped, stop)
    generator = torch.Generator().manual_seed(0)
    responses = pf.generate(model, queries, mask, 2, LENGTH, 1.0, stop, generator=generator)
    padded, grown, modes, scale, finite = 0.0, 0.0, 0.0, 0.0, True
    for rollout in (make_rollout(greedy, -1), make_rollout(responses, stop)):
        logprobs, _ = pf.response_logprobs_and_values(model, rollout, 1.0, 4)
        finite = finite and bool(torch.isfinite(logprobs).all())
        for i, (query, response) in enumerate(real_rows(rollout)):
            logits = alone(model, query + response)
            scale = max(scale, logits.std().item())
            right = logits[len(query) - 1 : -1].log_softmax(-1)[range(len(response)), response]
            padded = max(padded, (logprobs[i, : len(response)] - right).abs().max().item())
            steps = [alone(model, query + response[:t])[-1] for t in range(len(response))]
            grown = max(grown, (torch.stack(steps) - logits[len(query) - 1 : -1]).abs().max().item())
            model.train()
            modes = max(modes, (alone(model, query + response) - logits).abs().max().item())
            model.eval()
    truth |= {"padded": padded / scale, "grown": grown / scale, "modes": modes / scale, "finite": finite}
    return truth, rollout


def ppo_step(folder: str, kind: str, rollout: dict[str, torch.Tensor]) -> dict:
    """One minibatch as pfppo_single.py's `main` makes it: gradients, first ratio, values against alone."""
    torch.manual_seed(1)
    args = pf.Args(policy=folder, reward="module:function", prompts="", critic=kind)
    policy = pf.load_causal_lm(folder)
    critic = pf.make_critic(args, policy)
    for parameter in (critic if kind == "shared" else critic.scalar_head).parameters():
        torch.nn.init.normal_(parameter)
    model = pf.PolicyAndCritic(policy, critic).eval()
    logprobs, values = pf.response_logprobs_and_values(model, rollout, 1.0, 4)
    differ = 0.0
    for i in range(len(values)):
        row = {name: tensor[i : i + 1] for name, tensor in rollout.items()}
        ours = pf.response_logprobs_and_values(model, row, 1.0, 1)[1]
        differ = max(differ, (ours - values[i]).abs().max().item())
    generator, mask = torch.Generator().manual_seed(0), rollout["response_mask"]
    advantages, returns = torch.randn(2, *mask.shape, generator=generator)
    kept = rollout | {"logprobs": logprobs, "values": values, "returns": returns, "advantages": advantages}
    kept["loss_weights"] = pf.loss_weights(mask)
    model.train()
    loss, _, ratio = pf.minibatch_loss(model, pf.trim(kept, torch.arange(len(mask))), args)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    finite = bool(torch.isfinite(loss)) and all(torch.isfinite(g).all().item() for g in gradients)
    largest = max(float(g.abs().max()) for g in gradients)
    result = {"finite": finite, "moves": largest > 0, "ratio": (ratio - 1).abs().max().item()}
    return result | {"values": differ / values[mask].std().item()}


def reward_truth(folder: str, saved: str, rollout: dict[str, torch.Tensor]) -> dict:
    """A reward model on the way that it takes: made by rm_single.py, saved, loaded by pfppo_single.py."""
    config, auto = pf.load_config(folder, "model"), transformers.AutoModelForSequenceClassification
    if type(config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return {"message": "--model: transformers has no sequence classification form of it"}
    with torch.device("meta"):
        if not isinstance(getattr(auto.from_config(config), "score", None), torch.nn.Linear):
            return {"message": "--model: that form of it has no layer `score`"}
    torch.manual_seed(2)
    backbone = pf.load_causal_lm(folder).base_model
    model = rm.RewardModel(backbone)
    rm.init_head(model)
    rm.set_gain_and_bias(model, 0.7, 0.3)
    model.scalar_head.bias.data.fill_(0.2)
    queries = [query + response for query, response in real_rows(rollout)]
    check = check_message(reward_checks, model, queries)
    result, model = dict(check), model.eval()
    scores = pf.reward_model_scores(model, rollout, 4)
    with torch.no_grad():
        right = [
            backbone(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state for row in queries
        ]
        right = torch.stack([model.scalar_head(x[0, -1].float())[0] * 0.7 + 0.3 for x in right])
    scale = scores.std()
    result["padded"] = ((scores - right).abs().max() / scale).item()
    rm.as_classifier(model).save_pretrained(saved)
    tiny_tokenizer().save_pretrained(saved)
    result |= check_message(pf.check_reward_model, saved, "reward", tiny_tokenizer(), queries, 0)
    if "message" in result:
        return result
    loaded = pf.load_reward_model(saved).eval()
    again = pf.reward_model_scores(loaded, rollout, 4)
    result["loaded"] = ((again - scores).abs().max() / scale).item()
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(saved).eval()
    plain.config.get_text_config().pad_token_id = None  # it would end a row at the first such token
    c = plain.config
    with torch.no_grad():
        logits = torch.stack([plain(input_ids=torch.tensor([row])).logits[0, 0] for row in queries])
    logits = c.reward_gain * (logits + c.score_bias) + c.reward_bias
    result["plain transformers"] = ((logits - right).abs().max() / scale).item()
    return result


def reward_checks(model, rows: list[list[int]]) -> None:
    """What rm_single.py's `main` refuses."""
    rm.check_model(ACCELERATOR, model, rows, 0, "model")


def policy_checks(model, rows: list[list[int]], new_tokens: int) -> None:
    """What pfppo_single.py's `main` refuses, in its order."""
    pf.check_model(ACCELERATOR, model, rows, new_tokens, "policy")
    pf.check_cache(ACCELERATOR, model, rows, "policy")


def try_architecture(name: str) -> dict:
    """Everything about one name, as it stands in architectures.jsonl."""
    result = {"name": name}
    with tempfile.TemporaryDirectory() as folder:
        path, saved = f"{folder}/model", f"{folder}/reward"
        try:
            result |= save_tiny(name, path)
        except Exception as error:
            return result | {"build": short(error)}
        loaded = {}
        check = check_message(lambda: loaded.update(model=pf.load_causal_lm(path, field="policy")))
        if check:
            return result | {"load": {name: text.replace(folder, "DIR") for name, text in check.items()}}
        result["check"], rollout = check_message(policy_checks, loaded["model"], ROWS, LENGTH), None
        parts = {"truth": lambda: policy_truth(loaded["model"])}
        for kind in ("separate", "shared"):
            parts[f"{kind} critic"] = lambda kind=kind: ppo_step(path, kind, rollout)
        parts["reward"] = lambda: reward_truth(path, saved, rollout)
        for part, function in parts.items():
            try:
                found = function()
                if part == "truth":
                    found, rollout = found
            except Exception as error:
                found = {"error": short(error).replace(folder, "DIR")}
            result[part] = found
            if rollout is None:  # the other parts can be tried on any tokens
                rollout = make_rollout(torch.arange(6 * LENGTH).view(6, LENGTH) % 30 + 5, 20)
    return result


def wrong_parts(found: dict) -> list[str]:
    """Names of a part's numbers and truth values that are not as they must be."""
    bounded = {name: value for name, value in found.items() if not isinstance(value, str)}
    return [
        name for name, value in bounded.items() if not (value if isinstance(value, bool) else value < BOUND)
    ]


def judged(check: dict, found: dict) -> tuple[str, str]:
    """What a check says and what is true -> an outcome and a reason."""
    wrong = [found["error"]] if "error" in found else wrong_parts(found)
    if "error" in check or check.get("lines", 1) > 1:
        return "error", check.get("error", "more than one line: " + check.get("message", ""))
    if "message" in check:
        return ("refused" if wrong else "refused wrongly"), check["message"]
    if "error" in found:
        return "error", found["error"]
    return ("wrong without a word", ", ".join(wrong)) if wrong else ("works", "")


def outcomes(row: dict) -> dict[str, tuple[str, str]]:
    """Outcome and reason of each column of the table. What a refused policy would do is no outcome."""
    if "build" in row:
        return dict.fromkeys(COLUMNS, ("not tried", row["build"]))
    if "load" in row:
        return dict.fromkeys(COLUMNS, judged(row["load"], {"error": ""}))
    result = {"policy": judged(row["check"], row["truth"])}
    for kind in ("separate critic", "shared critic"):
        outcome = judged(row[kind].get("check", {}), row[kind])
        result[kind] = ("–", "") if result["policy"][0] == "refused" else outcome
    reward = row["reward"]
    missing = re.search("no sequence classification form|no layer `score`", reward.get("message", ""))
    check = {name: reward[name] for name in ("message", "lines") if name in reward}
    result["reward model"] = ("refused", reward["message"]) if missing else judged(check, reward)
    return result


def table(rows: list[dict]) -> str:
    """Counts of each outcome, then a line for each name, in markdown."""
    judgements = {row["name"]: outcomes(row) for row in rows}
    kinds = ("works", "refused", "refused wrongly", "wrong without a word", "error", "not tried", "–")
    lines = [f"| outcome | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for kind in kinds:
        counts = [sum(found[column][0] == kind for found in judgements.values()) for column in COLUMNS]
        lines.append(f"| {kind} | {' | '.join(map(str, counts))} |")
    lines += ["", f"| architecture | {' | '.join(COLUMNS)} | why |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, found in sorted(judgements.items()):
        reasons = list(dict.fromkeys(reason for _, reason in found.values() if reason))
        why = "; ".join(reasons).replace("|", "/").replace("--policy: on your own rows the model ", "")
        lines.append(f"| {name} | {' | '.join(found[column][0] for column in COLUMNS)} | {why} |")
    return "\n".join(lines) + "\n"


def child(name: str, path: str, gigabytes: int, seconds: int) -> None:
    """Runs in the process of one architecture; writes its result to a file."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + gigabytes * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    spent = int(time.process_time()) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (spent, spent))
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        result = try_architecture(name)
    records.write_json(Path(path), result)


def in_child(name: str, args: Args) -> dict:
    """try_architecture in a process of its own, which may take too long, too much memory, or crash."""
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.json")
        process = multiprocessing.get_context("fork").Process(
            target=child, args=(name, str(path), args.gigabytes, args.seconds)
        )
        process.start()
        process.join(6 * args.seconds)
        late = process.is_alive()
        if late:
            process.kill()
            process.join()
        result = json.loads(path.read_text()) if path.is_file() else {"name": name}
    if "class" not in result and "build" not in result:
        late = late or process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
        result["build"] = f"over {args.seconds} s" if late else f"ended with status {process.exitcode}"
    return result | {"seconds": round(time.time() - start, 1)}


def main(args: Args) -> None:
    transformers.logging.set_verbosity_error()
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path, names = folder / "architectures.jsonl", [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]
    unknown = sorted(set(args.only) - set(names))
    if unknown:
        raise SystemExit(f"--only {' '.join(unknown)}: no such name; there are {', '.join(names)}")
    assert transformers.LlamaForCausalLM  # what all of them import is imported once
    done = {row["name"] for row in records.finished_rows(path)}
    for name in args.only or names:
        if name not in done:
            row = in_child(name, args)
            records.append_row(path, row)
            print(
                name,
                *(f"{column}: {outcome}" for column, (outcome, _) in outcomes(row).items()),
                sep="  ",
                flush=True,
            )
    records.write_text(folder / "table.md", table(records.finished_rows(path)))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(tyro.cli(Args, description=__doc__))
