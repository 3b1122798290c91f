"""What the baselines share: settings, pairs, log-probabilities of whole responses, and one run's counters.

Everything that pfppo_single.py does as a function is taken from there, so a response is tokenised, generated,
scored and evaluated here exactly as under PPO: same prompts, same stop token, same reward, same eval/* tags
and seeds. One process (CPU or one GPU), no dropout; π_SFT is the start, the reference of every loss and of
eval/kl. Weights are float32, and --mixed_precision bf16 of accelerate is autocast around every model: policy and
reference are rounded alike, so that log-ratios start at 0 up to rounding.
"""

import math
import time
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

import pfppo_single as pfppo
import rm_single as rm
from pfppo_single import Amount, Count, Positive, Whole


@dataclass(kw_only=True)
class Args:
    # run
    output_dir: str = "output/baseline"
    """folder for everything this run writes; a folder that holds another run is refused"""
    seed: Whole = 1
    """data order, sampling and ties get their own generators from (seed, step)"""
    dry_run: bool = False
    """read and check everything, print the derived sizes, and stop before weights are loaded"""
    log_with: str = "tensorboard"
    """tracker of accelerate, as in pfppo_single.py; or `none`"""
    # models
    policy: str
    """π_SFT, the start of π_θ and the reference: folder or hub id of a causal language model"""
    # data
    prompt_field: str = "prompt"
    """column with the prompt: text, or a list of chat messages (the tokenizer's chat template is applied)"""
    chat_template: str | None = None
    """file with a Jinja template, in place of the tokenizer's own if it has one; saved with the policy"""
    query_length: Count = 128
    """longest query in tokens"""
    long_queries: Literal["drop", "keep_start"] = "drop"
    """what happens to a query longer than query_length; one of eval_prompts is never dropped but refused"""
    response_length: Count = 48
    """longest response in tokens, the stop token included"""
    stop_token: str = "eos"
    """token that ends a response: `eos`, `none`, a token, a text that is one, or an id"""
    temperature: Positive = 1.0
    """divides the logits of policy and reference alike, in sampling and in log-probabilities"""
    forward_batch_size: Count = 64
    """rows in one forward pass without gradient (scores, log-probabilities)"""
    generation_batch_size: Count = 640
    """responses that are generated at a time"""
    micro_batch_size: Count = 32
    """rows in one forward and backward pass; changes memory and speed, not the gradient"""
    # optimizer
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """per optimizer step: constant, or falling to zero"""
    warmup_steps: Whole = 0
    """optimizer steps over which the learning rate rises linearly"""
    eps: Positive = 1e-5
    """Adam's epsilon"""
    max_grad_norm: Amount = 1.0
    """clip the gradient norm at this; 0: never"""
    # evaluation and logging
    eval_prompts: str | None = None
    """held-out prompts; none: no evaluation, and no policy_best"""
    actual_score: str | None = None
    """s: `module:function` as in `reward`, for example unit tests; needed for eval/*_pass1"""
    # what the functions of pfppo_single.py read beside these, the same in every baseline
    mask_after_stop: ClassVar[bool] = True
    stop_after: ClassVar[int] = 0


@dataclass(kw_only=True)
class PairFields:
    """Columns of preference pairs, and pairs that are held out."""

    eval_data: str | None = None
    """held-out preference pairs, same columns; evaluations report how they are told apart"""
    chosen_field: str = "chosen"
    """column with the better response, KTO's desirable one: a text, or messages that end with it"""
    rejected_field: str = "rejected"
    """column with the worse response, KTO's undesirable one, likewise"""


@dataclass(kw_only=True)
class SamplingArgs(Args):
    """Of RAFT, BOND and Iterative-DPO, which learn from samples and the reward model."""

    reward: str
    """R_φ: folder or hub id of a sequence classification model with one label, or `module:function`"""
    prompts: str
    """training prompts: .jsonl, .json, .parquet, or hub id `name:split`"""


@dataclass(kw_only=True)
class PairArgs(PairFields, Args):
    """Of DPO, IPO and KTO, which learn from preference pairs."""

    reward: str | None = None
    """as pfppo_single.py's, for eval/*_reward only; none: without these tags"""
    train_data: str
    """preference pairs as rm_single.py reads them: .jsonl, .json, .csv, .parquet, or hub id `name:split`"""
    prompts: ClassVar[None] = None


# ---------------------------------------------------------------- pairs and log-probabilities


def read_pairs(args: PairFields, tokenizer, config, stop_id: int, field: str = "train_data") -> list[dict]:
    """Labels of rm_single.py with two samples, the better one first; longer ones are left out and counted,
    and so are pairs that stand in the file more than once."""
    path = getattr(args, field)
    token_ids = {"best", "sample0"} & set(rm.load_rows(path, field)[0])
    where = f"--{field} {path}: labels are token ids"
    pfppo.refuse((token_ids != set(), f"{where}; a baseline reads texts, with {args.prompt_field}"))
    pairs, left_out = rm.read_labels(field, args, tokenizer, config, stop_id)
    repeated = len(pairs) - len({str((pair["query"], pair["samples"])) for pair in pairs})
    prompts = len({tuple(pair["query"]) for pair in pairs})
    print(f"--{field}: {len(pairs)} pairs of {prompts} prompts, {left_out} longer ones left out", end="")
    print(f", {repeated} are repetitions of another" if repeated else "")
    return pairs


def pass_order(rows: int, num_steps: int, batch_size: int, seed: int, what: str = "pair") -> list[int]:
    """Indices of all steps, in shuffled passes over the rows; says how often training sees a row."""
    order = pfppo.prompt_order(rows, 0, num_steps * batch_size, seed)
    times = Counter(order)
    counts = sorted({times[row] for row in range(rows)})
    seen = "once" if counts == [1] else f"{' or '.join(map(str, counts[:1] + counts[1:][-1:]))} times"
    unseen = sum(times[row] == 0 for row in range(rows))
    never = f"; {unseen} of {rows} never: they fill no batch" if unseen else ""
    print(f"{num_steps} optimizer steps of {batch_size}: training sees a {what} {seen}{never}")
    return order


def make_rollout(query_ids: list[list[int]], response_ids: list[list[int]], device) -> dict[str, Tensor]:
    """Lists of ids -> the tensors of a rollout as pfppo_single.py has them: queries padded left, responses
    padded right. Prompt and response were tokenised apart: the boundary is where sampling has it."""
    queries, query_mask = pfppo.pad_left(query_ids, device)
    mirrored = pfppo.pad_left([ids[::-1] for ids in response_ids], device)
    responses, response_mask = (tensor.flip(1) for tensor in mirrored)
    rollout = {"queries": queries, "query_mask": query_mask, "responses": responses}
    return rollout | {"response_mask": response_mask, "score_mask": response_mask}


def pair_rollout(pairs: list[dict], device) -> dict[str, Tensor]:
    """P pairs -> rollout of 2P rows, all chosen responses before all rejected ones."""
    queries = [pair["query"] for pair in pairs] * 2
    return make_rollout(queries, [pair["samples"][k] for k in (0, 1) for pair in pairs], device)


def sequence_logprobs(
    model: nn.Module, rollout: dict[str, Tensor], rows: Tensor, temperature: float
) -> Tensor:
    """log π(y|c) of the given rows (rows,), with gradient: the sum over response tokens, stop token included;
    the prompt and the padding do not count."""
    batch = pfppo.trim(rollout, rows)
    width = batch["responses"].shape[1]
    inputs = pfppo.model_inputs(batch["query_responses"], batch["mask"])
    logits = model(**inputs, use_cache=False, logits_to_keep=width + 1).logits[:, :-1]
    return pfppo.token_logprobs(logits, batch["responses"], batch["response_mask"], temperature).sum(1)


def rollout_metrics(scores: Tensor, rollout: dict[str, Tensor]) -> dict[str, float]:
    """scores (rows,) and rollout of everything that was sampled in a step -> objective/*, as under PPO."""
    metrics = {"objective/score": scores.mean().item()}
    metrics["objective/length"] = rollout["response_mask"].sum(1).float().mean().item()
    return metrics | {"objective/truncated": (~rollout["has_stop"]).float().mean().item()}


# ---------------------------------------------------------------- one run


SHOWN = ("train/loss", "objective/score", "eval/accuracy", "eval/margin", "eval/greedy_pass1")
SHOWN += ("eval/sampled_reward", "eval/kl")


def no_reward(prompts: list, responses: list[str], rows: list[dict]) -> list[float]:
    """Stands where pfppo_single.evaluate wants a reward and none was given."""
    return [0.0] * len(responses)


class Run:
    """Models, folder and counters of one run. `state` is what a checkpoint keeps beside the weights: step,
    episodes (responses generated), optimizer_step, and the best evaluation so far."""

    def __init__(self, args: Args):
        """Everything that can be refused without weights. `rows`: training prompts, where there are any."""
        pfppo.check_ranges(args)
        self.args = args
        self.accelerator = pfppo.start_accelerator(False, args.log_with, args.output_dir)
        pfppo.refuse(
            (self.accelerator.num_processes > 1, "a baseline runs on one process; use --num_processes 1"),
            (self.accelerator.scaler is not None, "a baseline takes --mixed_precision bf16 or no, not fp16"),
            (args.actual_score is not None and not args.eval_prompts, "--actual_score needs --eval_prompts"),
        )
        self.device, self.config = self.accelerator.device, pfppo.load_config(args.policy, "policy")
        self.tokenizer = pfppo.load_pretrained("AutoTokenizer", args.policy, "policy", args.chat_template)
        self.stop_id = pfppo.stop_token_id(self.tokenizer, args.stop_token)
        self.rows = pfppo.read_prompts("prompts", args, self.tokenizer)
        self.eval_rows = pfppo.read_prompts("eval_prompts", args, self.tokenizer)
        self.eval_pairs = []
        if isinstance(args, PairFields) and args.eval_data:
            self.eval_pairs = read_pairs(args, self.tokenizer, self.config, self.stop_id, "eval_data")
        self.evaluates = bool(self.eval_rows or self.eval_pairs)
        queries = [row["query_ids"] for row in self.rows + self.eval_rows]
        pfppo.check_rows(self.config, [[max(self.stop_id, 0)]], "stop_token")
        pfppo.check_rows(self.config, queries, "policy", args.response_length)
        self.reward = None
        if args.reward and ":" in args.reward:
            self.reward = pfppo.load_function(args.reward, "reward")
        elif args.reward:
            read = (self.tokenizer, queries, args.response_length, self.config.get_text_config().vocab_size)
            pfppo.check_reward_model(args.reward, "reward", *read)
        self.actual_score = None
        if args.actual_score:
            self.actual_score = pfppo.load_function(args.actual_score, "actual_score")
        self.state = {"step": 0, "episodes": 0, "optimizer_step": 0, "best": -math.inf}

    def start(self, num_steps: int, num_optimizer_steps: int, with_anchor: bool = False) -> None:
        """Opens the folder, loads models; continues from the newest checkpoint, or evaluates π_SFT first."""
        args = self.args
        self.num_steps, self.num_optimizer_steps = num_steps, num_optimizer_steps
        self.output_dir = pfppo.open_run(self.accelerator, args)
        set_seed(args.seed)
        self.policy = pfppo.load_causal_lm(args.policy).to(self.device).eval()  # dropout is off in both modes
        self.ref_policy = pfppo.load_causal_lm(args.policy).to(self.device).eval().requires_grad_(False)
        if args.reward and self.reward is None:
            self.reward = pfppo.load_reward_model(args.reward).to(self.device).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), eps=args.eps, weight_decay=0.0)
        self.policy, self.optimizer = self.accelerator.prepare(self.policy, self.optimizer)
        if with_anchor:
            anchor = pfppo.load_causal_lm(args.policy).to(self.device).eval().requires_grad_(False)
            self.anchor = self.accelerator.prepare(anchor)
        self.checkpointed = (self.policy, self.optimizer, *([self.anchor] if with_anchor else []))
        state = pfppo.load_checkpoint(self.accelerator, self.output_dir, *self.checkpointed)
        self.state = state or self.state
        pfppo.open_metrics(self.accelerator, args, self.output_dir, state["step"] + 1 if state else 0)
        self.first_step, self.run_start, self.clock = self.state["step"], time.time(), time.time()
        if self.eval_pairs:
            self.eval_rollout = pair_rollout(self.eval_pairs, self.device)  # (2P, ...)
            self.eval_ref_logprobs = self.logprobs(self.ref_policy, self.eval_rollout)  # (2P,)
        if state is None and self.evaluates:
            results = self.evaluate() | {"episodes": 0, "optimizer_step": 0}
            pfppo.log_metrics(self.accelerator, self.output_dir, 0, results, SHOWN, f"/{num_steps}")

    def next_prompts(self, index: int, count: int) -> list[dict]:
        """The index-th `count` rows of the stream of shuffled passes over the training prompts."""
        picks = pfppo.prompt_order(len(self.rows), index * count, count, self.args.seed)
        return [self.rows[i] for i in picks]

    def sample(
        self, rows: list[dict], n: int, *key: int, model: nn.Module | None = None
    ) -> dict[str, Tensor]:
        """n responses to each row -> rollout with prompt_ids, those of a row adjacent; `key` seeds it."""
        args, generator = self.args, pfppo.random_generator(self.device, self.args.seed, *key)
        model = self.policy if model is None else model
        with self.accelerator.autocast():
            rollout = pfppo.sample_rollout(model, rows, n, args.temperature, args, self.stop_id, generator)
        return rollout | {"prompt_ids": torch.arange(len(rows), device=self.device).repeat_interleave(n)}

    def score(self, rows: list[dict], rollout: dict[str, Tensor]) -> Tensor:
        """R_φ of every response (rows,)."""
        texts = pfppo.decode_responses(self.tokenizer, rollout)
        with self.accelerator.autocast():
            return pfppo.score_rollout(self.reward, rows, rollout, texts, self.args)

    def rank_scores(self, scores: Tensor, rollout: dict[str, Tensor]) -> Tensor:
        """Scores for ranking (rows,): a response that never stops is worse than every other (-inf), as it is
        under PPO with a low `--missing_stop_score`. Raises ValueError when a score is not finite."""
        if not torch.isfinite(scores).all():
            raise ValueError("the reward is not finite for some responses; look at --reward")
        return torch.where(rollout["has_stop"], scores, -torch.inf) if self.stop_id >= 0 else scores

    def logprobs(self, model: nn.Module, rollout: dict[str, Tensor]) -> Tensor:
        """log π(y|c) of every row (rows,), without gradient."""
        temperature, size = self.args.temperature, self.args.forward_batch_size
        with self.accelerator.autocast():
            return pfppo.response_logprobs_and_values(model, rollout, temperature, size)[0].sum(1)

    def evaluate(self) -> dict[str, float]:
        """pfppo_single.py's eval/* after the current step, and the held-out pairs'; keeps the policy where it
        is the best so far."""
        if not self.eval_rows:
            return self.evaluate_pairs()
        judges = (self.ref_policy, no_reward if self.reward is None else self.reward, self.actual_score)
        models, tokens = (self.accelerator, self.policy, judges), (self.tokenizer, self.stop_id)
        results = pfppo.evaluate(*models, self.eval_rows, *tokens, self.args, self.state["step"])
        if self.reward is None:
            results = {tag: value for tag, value in results.items() if not tag.endswith("_reward")}
        if pfppo.best_score(results) > self.state["best"]:
            self.state["best"] = pfppo.best_score(results)
            self.save_policy("policy_best")
        return results | self.evaluate_pairs()

    def evaluate_pairs(self) -> dict[str, float]:
        """Held-out pairs: eval/margin, how much more than π_SFT the policy prefers the better response, in
        nats (difference of the two log-ratios); eval/accuracy, the share of pairs where it does, ties 1/2."""
        if not self.eval_pairs:
            return {}
        logratios = self.logprobs(self.policy, self.eval_rollout) - self.eval_ref_logprobs
        margin = logratios[: len(self.eval_pairs)] - logratios[len(self.eval_pairs) :]
        accuracy = (margin > 0).float() + 0.5 * (margin == 0)
        return {"eval/accuracy": accuracy.mean().item(), "eval/margin": margin.mean().item()}

    def optimizer_step(self, loss: float) -> None:
        """Clip, step, count. Raises FloatingPointError when the loss or the gradient is not finite."""
        args, done = self.args, self.state["optimizer_step"]
        norm = self.accelerator.clip_grad_norm_(self.policy.parameters(), args.max_grad_norm or math.inf)
        pfppo.check_finite(self.accelerator, self.state["step"] + 1, loss, float(norm))
        for group in self.optimizer.param_groups:
            schedule = (self.num_optimizer_steps, args.lr_schedule, args.warmup_steps)
            group["lr"] = pfppo.scheduled_lr(args.lr, done, *schedule)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state["optimizer_step"] = done + 1

    def end_step(self, metrics: dict[str, float], checkpoint: bool = False) -> None:
        """Counts and logs one step; evaluates and writes a checkpoint where they are due."""
        self.state["step"] += 1
        step, last, now = self.state["step"], self.state["step"] == self.num_steps, time.time()
        metrics |= {name: self.state[name] for name in ("episodes", "optimizer_step")}
        metrics["seconds/update"] = now - self.clock
        if self.evaluates and (step % self.args.eval_every == 0 or last):
            metrics |= self.evaluate()
            metrics["seconds/evaluate"] = time.time() - now
        left = (time.time() - self.run_start) / (step - self.first_step) * (self.num_steps - step)
        progress = f"/{self.num_steps}, {left:.0f} s left"
        pfppo.log_metrics(self.accelerator, self.output_dir, step, metrics, SHOWN, progress)
        if checkpoint or last or step % self.args.checkpoint_every == 0:
            pfppo.save_checkpoint(self.accelerator, self.output_dir, step, self.state, *self.checkpointed)
        self.clock = time.time()

    def save_policy(self, name: str) -> None:
        policy = self.accelerator.unwrap_model(self.policy, keep_torch_compile=False)
        pfppo.save_model(self.accelerator, policy, self.tokenizer, self.stop_id, self.output_dir / name)

    def finish(self) -> None:
        """Writes the last policy and says where it is."""
        self.save_policy("policy")
        episodes, steps = self.state["episodes"], self.state["optimizer_step"]
        print(f"done: {episodes} responses, {steps} optimizer steps; {self.output_dir / 'policy'}")
