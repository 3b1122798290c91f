"""Versions of transformers: both spellings of what was renamed in 5.24, and no call that is on its way out."""

import logging
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import causal_lm, make_rollout, rm_settings, sft_settings, tiny_settings

import pfppo_single as pf
import rm_single as rm
import sft_single as sft


class OneSpelling(torch.nn.Module):
    """A language model whose forward takes its cache under one name only, whatever the installed version
    says."""

    def __init__(self, name: str, model: torch.nn.Module):
        super().__init__()
        self.model, self.config = model, model.config
        names = pf.inspect.signature(model.forward).parameters
        self.inner = "cache" if "cache" in names else "past_key_values"
        self.forward = {"cache": self.new, "past_key_values": self.old}[name]

    def new(self, input_ids, attention_mask, position_ids, cache=None, use_cache=None, logits_to_keep=0):
        return self.call(cache, input_ids, attention_mask, position_ids, use_cache, logits_to_keep)

    def old(
        self, input_ids, attention_mask, position_ids, past_key_values=None, use_cache=None, logits_to_keep=0
    ):
        return self.call(past_key_values, input_ids, attention_mask, position_ids, use_cache, logits_to_keep)

    def call(self, cache, ids, mask, positions, use_cache, kept):
        assert cache is not None and use_cache, "sampling without a cache would still give the same tokens"
        settings = {self.inner: cache, "use_cache": use_cache, "logits_to_keep": kept}
        return self.model(input_ids=ids, attention_mask=mask, position_ids=positions, **settings)


@pytest.mark.parametrize("spelling", ["cache", "past_key_values"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_sampling_hands_over_its_cache_under_the_name_that_the_model_knows(name, spelling):
    # each token after the first is computed from the cache: one column is fed
    model, rollout, widths = causal_lm(name), make_rollout([3, 7], [1, 1]), []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    queries, mask = rollout["queries"], rollout["query_mask"]
    found = pf.generate(OneSpelling(spelling, model), queries, mask, 2, 8, 0.0, -1)
    assert widths == [7] + [1] * 7
    assert torch.equal(found, pf.generate(model, queries, mask, 2, 8, 0.0, -1))


@pytest.mark.parametrize(
    "methods, called",
    [
        (["gradient_checkpointing_enable"], "gradient_checkpointing_enable"),
        (["activation_checkpointing_enable"], "activation_checkpointing_enable"),
        (
            ["gradient_checkpointing_enable", "activation_checkpointing_enable"],
            "activation_checkpointing_enable",
        ),
    ],
)
def test_activations_are_recomputed_under_the_name_that_the_model_knows(methods, called):
    calls = []
    model = SimpleNamespace(**{name: lambda name=name: calls.append(name) for name in methods})
    pf.recompute_activations(model)
    assert calls == [called]


@pytest.mark.parametrize("name", ["sft", "rm", "pf"])
def test_no_call_of_ours_is_on_its_way_out(world, tmp_path, name):
    # in a whole run with all that samples, checkpoints and evaluates; what transformers says once it would
    # not say again, so its memory is cleared first
    folder, said = tmp_path / "run", []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    transformers.utils.logging.warning_once.cache_clear()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            if name == "sft":
                sft.main(sft.Args(**sft_settings(world, folder, epochs=1, gradient_checkpointing=True)))
            elif name == "rm":
                settings = rm_settings(world, folder, epochs=1, gradient_checkpointing=True, kl_samples=4)
                rm.main(rm.Args(**settings))
            else:
                settings = tiny_settings(world, folder) | dict(eval_prompts=str(world / "eval.jsonl"))
                settings |= dict(total_episodes=16, gradient_checkpointing=True)
                pf.main(pf.Args(**settings))
    finally:
        logger.removeHandler(handler)
    words = ("deprecat", "past_key_values", "removed in", "use `", "instead")
    assert [text for text in said if any(word in text for word in words)] == []
