"""Bytes that a phase of a script makes and lets go: it runs once on tensors with a shape but no data, and every
tensor is counted while it lives. benchmark/memory_plan.py adds what stays."""

import inspect
import weakref
from collections import Counter
from dataclasses import dataclass
from functools import cache

import torch
import transformers
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pfppo_single as pfppo


@dataclass(frozen=True, eq=False)
class Plan:
    """All that memory depends on. Configurations of models, not their weights."""

    script: str
    """sft, rm or pfppo"""
    args: object
    """Args of that script"""
    config: object
    """policy; for sft_single.py and rm_single.py the model"""
    reward: object = None
    """reward model of pfppo_single.py; none: a function"""
    critic: object = None
    """separate critic of pfppo_single.py; none: one layer on the policy"""
    world: int = 1
    """processes"""
    bf16: bool = False
    """--mixed_precision bf16"""
    device: str = "cuda"
    """where the models are; on a cpu what is read and saved lies there too"""


class Live(TorchDispatchMode):
    """Bytes of the tensors made and still alive while this is on, by kind, now and when they were most."""

    def __init__(self, vocab: int, *models, cpu: bool = False):
        super().__init__()
        weights = [x for model in models for x in (*model.parameters(), *model.buffers())]
        weights += [x.grad for x in weights if x.grad is not None]
        self.vocab, self.counted = vocab, {id(x.untyped_storage()) for x in weights}  # those by `state`
        self.kinds, self.now, self.peak = {}, Counter(), Counter()
        self.backward, self.cpu = False, cpu

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output, name = function(*args, **(kwargs or {})), function._opname
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                key, size = id(storage), storage.nbytes()
                if key not in self.counted and key not in self.kinds:
                    self.kinds[key] = (self.kind(name, tensor, args), size)
                    self.now[self.kinds[key][0]] += size
                    weakref.finalize(storage, self.forget, key)
        # autograd sums gradients in place, unless somebody is watching
        if name == "add" and self.backward and not torch.is_grad_enabled():
            self.forget(id(args[0].untyped_storage()))
        unseen = self.unseen(name, args)
        if self.now.total() + unseen.total() > self.peak.total():
            self.peak = self.now + unseen
        return output

    def unseen(self, name: str, args) -> Counter:
        """What a kernel makes for itself: logsumexp the exponentials; bmm of bfloat16 on a CPU a copy for every
        row of a matrix that they share (the output layer of a frozen model)."""
        if name == "logsumexp":
            return Counter(logits=args[0].nbytes)
        shared = name == "bmm" and self.cpu and args[1].stride(0) == 0 and args[1].dtype == torch.bfloat16
        return Counter(copies=args[1].numel() * args[1].itemsize if shared else 0)

    def kind(self, name: str, tensor, args) -> str:
        if tensor.ndim == 4 and name in ("zeros", "new_empty", "index_select"):
            return "cache"
        if name == "_to_copy" and id(args[0].untyped_storage()) in self.counted:
            return "copies"  # autocast's, of a weight
        return "logits" if self.vocab in tensor.shape else "activations"

    def forget(self, key: int) -> None:
        kind, size = self.kinds.pop(key, ("activations", 0))
        self.now[kind] -= size


FAKE = FakeTensorMode()  # tensors with shape, type and device "cpu", without memory


@cache
def models(plan: Plan) -> dict[str, nn.Module]:
    """The models of a script as its phases compute with them; `policy`, `critic`, `trained` have gradients."""
    sharded = torch.bfloat16 if plan.args.shard and plan.bf16 else None  # gathered in this type
    frozen = sharded or frozen_dtype(plan)
    trained = sharded or torch.float32

    def lm(config, dtype):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)

    with FAKE:
        if plan.script == "sft":
            made = {"policy": lm(plan.config, trained)}
        elif plan.script == "rm":
            made = {"trained": pfppo.RewardModel(lm(plan.config, trained).base_model)}
            made["ref"] = lm(plan.config, frozen)
        else:
            hidden = plan.config.get_text_config().hidden_size
            made = {"policy": lm(plan.config, trained), "critic": nn.Linear(hidden, 1)}
            if plan.critic is not None:
                made["critic"] = pfppo.RewardModel(lm(plan.critic, trained).base_model)
            made["ref"] = lm(plan.config, frozen)
            if plan.reward is not None:
                made["reward"] = pfppo.RewardModel(lm(plan.reward, frozen).base_model)
    for name, model in made.items():
        model.requires_grad_(name not in ("ref", "reward"))
        if (
            plan.args.gradient_checkpointing
            and name not in ("ref", "reward")
            and hasattr(backbone(model), "config")
        ):
            pfppo.recompute_activations(backbone(model))
    return made


def frozen_dtype(plan: Plan) -> torch.dtype:
    """Of weights that do not train."""
    name = getattr(plan.args, "frozen_dtype", "float32")
    return torch.bfloat16 if name == "bfloat16" or (name == "auto" and plan.bf16) else torch.float32


def backbone(model: nn.Module) -> nn.Module:
    return getattr(model, "lm_backbone", model)


def numbers(*modules) -> int:
    """Weights, those that are tied once."""
    return sum({x: x.numel() for module in modules for x in module.parameters()}.values())


def split(plan: Plan) -> tuple[list, list]:
    """Models that train, models that are frozen."""
    made = models(plan)
    frozen = [model for name, model in made.items() if name in ("ref", "reward")]
    return [model for name, model in made.items() if name not in ("ref", "reward")], frozen


def inside(plan: Plan, phase: str) -> list[nn.Module]:
    """The models that a phase computes with."""
    made = models(plan)
    names = {"generate": ("ref",) if plan.script == "rm" else ("policy",), "evaluate": ("policy",)}
    names |= {"score": ("trained", "reward"), "logprobs": ("policy", "critic")}
    names |= {"train": ("policy", "critic", "trained")}
    return [made[name] for name in names[phase] if name in made]


@cache
def simulate(plan: Plan, phase: str, rows: int) -> Counter:
    """Bytes of what a phase makes and lets go, for so many rows, when they are most."""
    args, used, train = plan.args, inside(plan, phase), phase == "train"
    rows = 2 * rows if train and plan.script == "rm" else rows  # a label has two responses
    for parameter in (x for model in used for x in model.parameters()):
        if train and args.shard:  # gradients leave a block as soon as they are there
            parameter.register_post_accumulate_grad_hook(lambda x: setattr(x, "grad", None))
        elif train:
            with FAKE:
                parameter.grad = torch.zeros_like(parameter)
    live = Live(plan.config.get_text_config().vocab_size, *used, cpu=plan.device == "cpu")
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=plan.bf16)
    with FAKE, live, autocast, torch.set_grad_enabled(train):
        [model.train(train) for model in used]
        if phase == "generate":
            sample_once(used[0], rows, plan)
        else:
            loss = forward(used, rows, plan, phase)
        if train:
            live.backward = True
            loss.backward()
    return live.peak


def forward(used: list, rows: int, plan: Plan, phase: str) -> torch.Tensor:
    """One forward pass as the script makes it, and its loss; the logits are gone when this returns."""
    args, r = plan.args, plan.args.response_length
    ids = torch.zeros(rows, args.query_length + r, dtype=torch.long)
    mask = torch.ones(ids.shape, dtype=torch.bool)
    responses, response_mask = ids[:, -r:], mask[:, -r:]
    if phase == "score" or plan.script == "rm":
        return used[0](ids, mask).sum()
    if phase == "train" and plan.script == "pfppo":
        batch = {"query_responses": ids, "mask": mask, "responses": responses, "response_mask": response_mask}
        names = ("loss_weights", "logprobs", "values", "advantages", "returns")
        batch |= {name: torch.zeros(rows, r) for name in names}
        return pfppo.minibatch_loss(pfppo.PolicyAndCritic(*used), batch, args)[0]
    if plan.script == "pfppo":
        logits, _ = pfppo.PolicyAndCritic(*used)(ids, mask, r)
    else:
        inputs = pfppo.model_inputs(ids, mask)
        logits = used[0](**inputs, use_cache=False, logits_to_keep=r + 1).logits[:, :-1]
    return pfppo.token_logprobs(logits, responses, response_mask, getattr(args, "temperature", 1.0)).sum()


def sample_once(model, rows: int, plan: Plan) -> None:
    """Reads the queries; then, as if written up to there, the last token but one; where responses can stop, an
    eighth of the rows leave; the last token."""
    args, n = plan.args, getattr(plan.args, "num_responses", 1)
    q, r, prompts = args.query_length, args.response_length, max(1, rows // n)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    made = pfppo.growing_cache(model.config)
    settings = {name: made, "use_cache": True, "logits_to_keep": 1}
    mask = torch.ones(rows, q + r, dtype=torch.bool)
    inputs = pfppo.model_inputs(mask.long(), mask)
    model(**{key: x[:prompts, :q] for key, x in inputs.items()}, **settings)
    for layer in made.layers:
        if type(layer).__name__ == "GrowingLayer":
            heads, size, kind = layer.keys.shape[1], layer.keys.shape[3], layer.keys.dtype
            layer.keys = layer.values = None  # the old ones are gone before the new ones are there
            rooms = [torch.zeros(rows, heads, columns(q, r, n), size, dtype=kind) for _ in range(2)]
            layer.keys, layer.values = (x[:, :, : q + r - 2] for x in rooms)
    for width in (q + r - 1, q + r):
        step = {key: x[:, width - 1 : width] for key, x in inputs.items()}
        step["attention_mask"] = inputs["attention_mask"][:, :width]
        logits = model(**step, **settings).logits[:, -1]
        torch.multinomial((logits.float() / 1.0).softmax(-1), 1)
        if args.stop_token != "none" and width < q + r:
            kept = torch.arange(rows - rows // 8)
            made.reorder_cache(kept)
            inputs = {key: x[: len(kept)] for key, x in inputs.items()}


def columns(q: int, r: int, n: int) -> int:
    """Columns that the cache has room for at the end: it grows by a half whenever it is full, first behind the
    queries, or behind the first token of their copies."""
    room = q + q // 2 if n == 1 else q + 1 + (q + 1) // 2
    while room < q + r:
        room = room + 1 + (room + 1) // 2
    return room
