"""What the baselines share: settings, models, sampling, scores, evaluation, counters, checkpoints.

Everything that pfppo_single.py does as a function is taken from there, so a response is tokenised, generated,
scored and evaluated here exactly as under PPO: same prompts, same stop token, same reward, same eval/* tags
and seeds. One process (CPU or one GPU), float32, no dropout; π_SFT is the start, the reference of every loss
and of eval/kl.
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from tqdm import tqdm

import pfppo_single as pfppo
from rm_single import encode_response


@dataclass
class Args:
    # run
    output_dir: str = "output/baseline"
    """folder for everything this run writes; one that holds another run is refused, the same command
    continues its own"""
    seed: int = 1
    """data order, sampling and ties get their own generators from (seed, step)"""
    dry_run: bool = False
    """check settings and data files, print the derived sizes, and stop before a model is loaded"""
    # models
    policy: str = ""
    """π_SFT, the start of π_θ and the reference: folder or hub id of a causal language model"""
    reward: str = ""
    """R_φ: a folder written by rm_single.py, or `module:function`; DPO, IPO and KTO need it for eval/*_reward
    only"""
    pad_token: str = ""
    """pad token for a tokenizer that has none"""
    # data
    prompt_field: str = "prompt"
    """column with the prompt: text, or a list of chat messages"""
    query_length: int = 128
    """longest query in tokens"""
    long_queries: Literal["drop", "keep_end", "keep_start"] = "drop"
    """what happens to a query longer than query_length"""
    response_length: int = 48
    """longest response in tokens, the stop token included"""
    stop_token: str = "eos"
    """token that ends a response: `eos`, `none`, a token or an id"""
    temperature: float = 1.0
    """divides the logits of policy and reference alike, in sampling and in log-probabilities"""
    forward_batch_size: int = 64
    """rows in one forward pass without gradient (scores, log-probabilities)"""
    generation_batch_size: int = 640
    """responses that are generated at a time"""
    micro_batch_size: int = 32
    """rows in one forward and backward pass; changes memory and speed, not the gradient"""
    # optimizer
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """per optimizer step: constant, or falling to zero"""
    warmup_steps: int = 0
    """optimizer steps over which the learning rate rises linearly"""
    eps: float = 1e-5
    """Adam's epsilon"""
    max_grad_norm: float = 1.0
    """clip the gradient norm at this; 0: never"""
    # evaluation and logging
    eval_prompts: str = ""
    """held-out prompts; empty: no evaluation, and no policy_best"""
    actual_score: str = ""
    """s: `module:function` as in `reward`, for example unit tests; needed for eval/*_pass1"""


def check_args(args: Args, needed: tuple[str, ...]) -> None:
    """Raises ValueError that names the field and the fix, before anything is loaded."""
    for field in needed:
        if getattr(args, field) == "":
            raise ValueError(f"--{field} is needed")
    for field in dataclasses.fields(args):
        value, least = getattr(args, field.name), 0 if field.name in ("seed", "warmup_steps") else 1
        if field.type is int and value < least:
            raise ValueError(f"--{field.name} must be at least {least}, not {value}")
        if field.name in ("lr", "beta", "temperature", "eps") and not value > 0:
            raise ValueError(f"--{field.name} must be above 0, not {value}")
    for field in ("prompts", "train_data", "eval_prompts"):
        path = getattr(args, field, "")
        if Path(path).suffix in (".jsonl", ".json", ".parquet") and not Path(path).is_file():
            raise FileNotFoundError(f"--{field} {path}: no such file")
    if (
        args.reward
        and ":" not in args.reward
        and not (Path(args.reward) / "reward_head.safetensors").is_file()
    ):
        raise ValueError(
            f"--reward {args.reward}: no reward_head.safetensors there; give a folder of rm_single.py "
            "or module:function"
        )


# ---------------------------------------------------------------- token functions


def sequence_logprobs(
    model: nn.Module, rollout: dict[str, torch.Tensor], rows: torch.Tensor, temperature: float
) -> torch.Tensor:
    """log π(y|c) of the given rows (rows,), with gradient: the sum over response tokens, stop token included;
    the prompt and the padding do not count."""
    batch = pfppo.trim(rollout, rows)
    width = batch["responses"].shape[1]
    inputs = pfppo.model_inputs(batch["query_responses"], batch["mask"])
    logits = model(**inputs, use_cache=False, logits_to_keep=width + 1).logits[:, :-1]
    return pfppo.token_logprobs(logits, batch["responses"], batch["response_mask"], temperature).sum(1)


def make_rollout(
    query_ids: list[list[int]], response_ids: list[list[int]], pad_token_id: int, device="cpu"
) -> dict[str, torch.Tensor]:
    """Lists of ids -> the tensors of a rollout as pfppo_single.py has them: queries padded left, responses
    padded right. A row's ids are the prompt's, then the response's, tokenised apart: the boundary is where
    sampling and scoring have it."""
    queries, query_mask = pfppo.pad_rows(query_ids, pad_token_id, "left")
    responses, response_mask = pfppo.pad_rows(response_ids, pad_token_id, "right")
    tensors = {
        "queries": queries,
        "query_mask": query_mask,
        "responses": responses,
        "response_mask": response_mask,
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def load_pairs(args, tokenizer, stop_id: int) -> list[dict]:
    """Rows of `train_data` with query_ids, chosen_ids and rejected_ids; rows with a longer query or response
    are dropped, and counted on the console. Raises ValueError that names file and row."""
    names = (args.chosen_field, args.rejected_field)
    rows = pfppo.load_rows(args.train_data, "train_data", (args.prompt_field, *names))
    for number, row in enumerate(rows, 1):
        if not all(isinstance(row[name], str) for name in names):
            raise ValueError(
                f"--train_data {args.train_data}, row {number}: {names[0]} and {names[1]} must be texts"
            )
    pairs = pfppo.encode_queries(tokenizer, rows, args, "train_data")
    for pair in pairs:
        pair["chosen_ids"], pair["rejected_ids"] = (
            encode_response(tokenizer, pair[name], stop_id) for name in names
        )
    pairs = [p for p in pairs if 0 < min(len(p["chosen_ids"]), len(p["rejected_ids"]))]
    pairs = [p for p in pairs if max(len(p["chosen_ids"]), len(p["rejected_ids"])) <= args.response_length]
    if not pairs:
        raise ValueError(
            f"--train_data {args.train_data}: every pair has a response longer than --response_length "
            f"{args.response_length}; raise it"
        )
    print(f"{len(pairs)} pairs, {len(rows) - len(pairs)} longer ones dropped")
    return pairs


# ---------------------------------------------------------------- one run


class Run:
    """Models, folder and counters of one run. `state` is what a checkpoint keeps beside the weights: step,
    episodes (responses generated), optimizer_step, and the best evaluation so far."""

    def __init__(self, args: Args):
        """Everything that can be refused without a model: processes, tokenizer, evaluation prompts,
        functions."""
        self.args, self.accelerator = args, Accelerator(mixed_precision="no")
        pfppo.refuse_sharding(self.accelerator.distributed_type.value)
        if self.accelerator.num_processes > 1:
            raise ValueError(
                f"a baseline runs on one process, not {self.accelerator.num_processes}; use --num_processes 1"
            )
        self.device, self.output_dir = self.accelerator.device, Path(args.output_dir)
        set_seed(args.seed)
        rows = (
            pfppo.load_rows(args.eval_prompts, "eval_prompts", (args.prompt_field,))
            if args.eval_prompts
            else []
        )
        self.tokenizer = pfppo.load_tokenizer(args.policy, args.pad_token)
        self.pad_id, self.stop_id = (
            self.tokenizer.pad_token_id,
            pfppo.stop_token_id(self.tokenizer, args.stop_token),
        )
        self.eval_rows = pfppo.encode_queries(self.tokenizer, rows, args, "eval_prompts") if rows else []
        self.actual_score = (
            pfppo.load_function(args.actual_score, "actual_score") if args.actual_score else None
        )
        self.reward_function = pfppo.load_function(args.reward, "reward") if ":" in args.reward else None
        self.state = {"step": 0, "episodes": 0, "optimizer_step": 0, "best": None}

    def start(self, num_steps: int, with_anchor: bool = False) -> None:
        """Open the folder, load models, continue from the newest checkpoint, or evaluate π_SFT as step 0."""
        args = self.args
        pfppo.open_run(args, 1)
        self.policy = pfppo.load_causal_lm(args.policy).to(self.device).eval()  # dropout is off in both modes
        self.ref_policy = pfppo.load_causal_lm(args.policy).to(self.device).eval().requires_grad_(False)
        self.reward_model = None
        if args.reward and self.reward_function is None:
            self.reward_model = pfppo.RewardModel.from_pretrained(args.reward).to(self.device).eval()
            self.reward_model.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), eps=args.eps, weight_decay=0.0)
        self.policy, self.optimizer = self.accelerator.prepare(self.policy, self.optimizer)
        if with_anchor:  # prepared, so that checkpoints hold it
            self.anchor = pfppo.load_causal_lm(args.policy).to(self.device).eval().requires_grad_(False)
            self.anchor = self.accelerator.prepare(self.anchor)
        found = pfppo.load_checkpoint(self.accelerator, self.output_dir / "checkpoints")
        self.state = found or self.state
        print(f"continues at step {found['step']} of {num_steps}" if found else f"starts: {num_steps} steps")
        self.writer = pfppo.open_metrics(self.output_dir, self.state["step"] or -1)
        self.num_steps, self.clock = num_steps, time.time()
        if found is None and self.eval_rows:
            results = self.evaluate(0)
            pfppo.log_metrics(
                self.writer, self.output_dir, 0, {**results, "episodes": 0, "optimizer_step": 0}
            )
            self.keep_best(results)
        self.bar = tqdm(total=num_steps, initial=self.state["step"], desc=self.output_dir.name, mininterval=5)

    def sample(
        self, rows: list[dict], n: int, temperature: float, *key: int, model: nn.Module | None = None
    ) -> dict[str, torch.Tensor]:
        """n responses to each row -> rollout whose first axis is the response, those of a row adjacent; `key`
        seeds it."""
        generator, responses = pfppo.random_generator(self.device, self.args.seed, *key), []
        padded = pfppo.pad_rows([row["query_ids"] for row in rows], self.pad_id, "left")
        queries, query_mask = (x.to(self.device) for x in padded)
        for part in torch.arange(len(rows), device=self.device).split(
            max(1, self.args.generation_batch_size // n)
        ):
            q = int(query_mask[part].sum(1).max())
            responses.append(
                pfppo.generate(
                    model or self.policy,
                    queries[part, -q:],
                    query_mask[part, -q:],
                    n,
                    self.args.response_length,
                    temperature,
                    self.stop_id,
                    0,
                    self.pad_id,
                    generator,
                )
            )
        responses = torch.cat(responses)
        mask, has_stop = pfppo.stop_masks(responses, self.stop_id, 0)
        return {
            "queries": queries.repeat_interleave(n, 0),
            "query_mask": query_mask.repeat_interleave(n, 0),
            "responses": responses,
            "response_mask": mask,
            "score_mask": mask,
            "has_stop": has_stop,
            "prompt_ids": torch.arange(len(rows), device=self.device).repeat_interleave(n),
        }

    def decode(self, rollout: dict[str, torch.Tensor]) -> list[str]:
        """Responses as text, up to the stop token; special tokens left out."""
        ids = [r[m].tolist() for r, m in zip(rollout["responses"], rollout["score_mask"])]
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def call(self, function, rows: list[dict], texts: list[str]) -> torch.Tensor:
        """A `module:function` on the responses of rows (each repeated for its responses) -> (rows,)
        float32."""
        repeated = [row for row in rows for _ in range(len(texts) // len(rows))]
        prompts = [row[self.args.prompt_field] for row in repeated]
        return torch.tensor(pfppo.call_function(function, prompts, texts, repeated), device=self.device)

    def score(self, rows: list[dict], rollout: dict[str, torch.Tensor]) -> torch.Tensor:
        """R_φ of every response (rows,)."""
        if self.reward_function is not None:
            return self.call(self.reward_function, rows, self.decode(rollout))
        return pfppo.reward_model_scores(self.reward_model, rollout, self.args.forward_batch_size)

    def rank_scores(self, scores: torch.Tensor, rollout: dict[str, torch.Tensor]) -> torch.Tensor:
        """Scores for ranking (rows,): a response that never stops is worse than every other (-inf), as the
        score that `--missing_stop replace` pays under PPO. Raises ValueError when a score is not finite."""
        if not torch.isfinite(scores).all():
            raise ValueError(
                "the reward is not finite for some responses; look at the reward model or function"
            )
        return torch.where(rollout["has_stop"], scores, -torch.inf) if self.stop_id >= 0 else scores

    def evaluate(self, step: int) -> dict[str, float]:
        """Greedy and sampled responses to the evaluation prompts, with pfppo_single.py's tags and seeds."""
        found = {}
        for name, temperature in (("greedy", 0.0), ("sampled", self.args.temperature)):
            rollout = self.sample(self.eval_rows, 1, temperature, 9, step, 0)
            if self.args.reward:
                found[f"eval/{name}_reward"] = self.score(self.eval_rows, rollout)
            if self.actual_score is not None:
                found[f"eval/{name}_pass1"] = self.call(
                    self.actual_score, self.eval_rows, self.decode(rollout)
                )
            if name == "sampled":
                found["eval/kl"] = self.logprobs(self.policy, rollout) - self.logprobs(
                    self.ref_policy, rollout
                )
            found[f"eval/{name}_length"] = rollout["response_mask"].sum(1)
            found[f"eval/{name}_truncated"] = ~rollout["has_stop"]
        return {tag: float(np.mean(values.cpu().numpy())) for tag, values in found.items()}

    def logprobs(self, model: nn.Module, rollout: dict[str, torch.Tensor]) -> torch.Tensor:
        """log π(y|c) of every row (rows,), without gradient."""
        temperature, size = self.args.temperature, self.args.forward_batch_size
        return pfppo.response_logprobs_and_values(model, rollout, temperature, size)[0].sum(1)

    def optimizer_step(self, loss: float, num_optimizer_steps: int) -> None:
        """Clip, step, count. Raises FloatingPointError when the loss is not finite; the last good checkpoint
        is kept."""
        args, done = self.args, self.state["optimizer_step"]
        if not np.isfinite(loss):
            raise FloatingPointError(
                f"step {self.state['step'] + 1}: the loss is {loss}; the last good checkpoint is kept "
                f"in {self.output_dir / 'checkpoints'}. Lower --lr"
            )
        if args.max_grad_norm > 0:
            self.accelerator.clip_grad_norm_(self.policy.parameters(), args.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = pfppo.scheduled_lr(
                args.lr, done, num_optimizer_steps, args.lr_schedule, args.warmup_steps
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state["optimizer_step"] = done + 1

    def end_step(self, metrics: dict[str, float], checkpoint: bool = False) -> None:
        """Count and log one step; evaluate, keep the best policy and write a checkpoint where they are
        due."""
        self.state["step"] += 1
        step, last, began = self.state["step"], self.state["step"] == self.num_steps, time.time()
        metrics = {
            **metrics,
            "episodes": self.state["episodes"],
            "optimizer_step": self.state["optimizer_step"],
            "seconds/update": began - self.clock,
        }
        if self.eval_rows and (step % self.args.eval_every == 0 or last):
            results = self.evaluate(step)
            self.keep_best(results)
            metrics.update(results, **{"seconds/evaluate": time.time() - began})
            shown = ("eval/greedy_pass1", "eval/sampled_pass1", "eval/sampled_reward", "eval/kl")
            text = "  ".join(f"{tag[5:]} {metrics[tag]:.3f}" for tag in shown if tag in metrics)
            self.bar.write(f"step {step}/{self.num_steps}  {text}")
        pfppo.log_metrics(self.writer, self.output_dir, step, metrics)
        self.bar.update()
        if checkpoint or last or step % self.args.checkpoint_every == 0:
            pfppo.save_checkpoint(self.accelerator, self.output_dir / "checkpoints", step, self.state)
        self.clock = time.time()

    def keep_best(self, results: dict[str, float]) -> None:
        """policy_best: the highest greedy pass@1 on the evaluation prompts (without actual score: highest
        reward)."""
        key = next((k for k in ("eval/greedy_pass1", "eval/sampled_reward") if k in results), None)
        if key and (self.state["best"] is None or results[key] > self.state["best"]):
            self.state["best"], self.state["best_step"] = results[key], self.state["step"]
            self.save_policy("policy_best")

    def save_policy(self, name: str) -> None:
        def write(folder: Path) -> None:
            self.accelerator.unwrap_model(self.policy).save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

        pfppo.write_folder(self.output_dir / name, write)

    def finish(self) -> None:
        """Write the last policy and say where it is."""
        self.bar.close()
        self.writer.close()
        self.save_policy("policy")
        print(
            f"done: {self.num_steps} steps, {self.state['episodes']} responses generated, "
            f"{self.state['optimizer_step']} "
            f"optimizer steps; policy in {self.output_dir / 'policy'}"
        )
