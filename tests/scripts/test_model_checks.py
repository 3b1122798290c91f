"""What a model must do before it is trained: the checks find models that do not, and let the others pass."""

import inspect

import pytest
import torch
from accelerate import Accelerator
from conftest import causal_lm, make_tokenizer, model_config, reward_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM, MixtralConfig

import pfppo_single as pf
import rm_single as rm
import sft_single as sft

NO_DROPOUT = {
    "gpt2": dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "llama": dict(attention_dropout=0.0),
}
ROWS = [[3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13], [20, 21, 22], [30, 31, 32, 33, 34]]


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


# ---------------------------------------------------------------- check_model


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_ordinary_models_pass(accelerator, name):
    pf.check_model(accelerator, causal_lm(name, **NO_DROPOUT[name]), ROWS, 8, "policy")
    pf.check_cache(accelerator, causal_lm(name), ROWS, "policy")
    pf.check_model(accelerator, reward_model(name), ROWS, 8, "reward")


def test_equally_long_rows_and_rows_of_one_token_pass(accelerator):
    for rows in ([[5]], [[5, 6], [7, 8]], [[5]] * 7):
        pf.check_model(accelerator, causal_lm("gpt2", **NO_DROPOUT["gpt2"]), rows, 0, "policy")
        pf.check_cache(accelerator, causal_lm("gpt2"), rows, "policy")


class Noisy(LlamaForCausalLM):
    """Random in train mode, as a router with jitter is."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if self.training:
            output.logits = output.logits + torch.rand_like(output.logits)
        return output


class Recurrent(LlamaForCausalLM):
    """Reads its padding: a mean over all columns so far goes into every logit."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        columns = torch.arange(1, output.logits.shape[1] + 1).view(1, -1, 1)
        output.logits = output.logits + output.logits.cumsum(1) / columns
        return output


class Ahead(LlamaForCausalLM):
    """Scales its logits by how long the row is, as a rotary embedding with two sets of factors does."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * (1 + (output.logits.shape[1] > 16))
        return output


class Infinite(LlamaForCausalLM):
    """Gives NaN."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * float("nan")
        return output


class Refusing(LlamaForCausalLM):
    """Takes no positions, as some architectures."""

    def forward(self, input_ids, attention_mask, use_cache=None):
        return super().forward(input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize(
    "model_class, message",
    [
        (Noisy, "differs between train and eval mode"),
        (Recurrent, "padding reaches its state"),
        (Ahead, "if more follow"),
        (Infinite, "NaN or infinity"),
        (Refusing, "fails on your own rows: .*position_ids"),
    ],
)
def test_what_fails_is_named(accelerator, model_class, message):
    torch.manual_seed(0)
    model = model_class(model_config("llama", **NO_DROPOUT["llama"]))
    with pytest.raises(SystemExit, match=f"^--policy: .*{message}"):
        pf.check_model(accelerator, model, ROWS, 16, "policy")


def test_a_model_that_counts_positions_in_its_own_way_is_refused(accelerator):
    # RoBERTa's first position is 2: fed with 0, 1, ... it is another model
    from transformers import RobertaConfig

    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=43, is_decoder=True, initializer_range=0.3, **sizes)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    with pytest.raises(SystemExit, match="padding reaches its state$"):
        pf.check_model(accelerator, AutoModelForCausalLM.from_config(config), ROWS, 4, "policy")


def test_an_error_of_the_library_is_one_line(accelerator):
    model = causal_lm("llama", **NO_DROPOUT["llama"])
    model.forward = lambda **_: torch.zeros(2).view(3)
    with pytest.raises(SystemExit, match="^--policy: the model fails on your own rows: shape .*$") as refusal:
        pf.check_model(accelerator, model, ROWS, 4, "policy")
    assert "\n" not in str(refusal.value)


def test_rows_of_the_length_of_a_run_are_tried(accelerator):
    model = Ahead(model_config("llama", **NO_DROPOUT["llama"]))
    pf.check_model(accelerator, model, ROWS, 5, "policy")  # 11 + 5 tokens at most
    with pytest.raises(SystemExit, match="lower query_length"):
        pf.check_model(accelerator, model, ROWS, 6, "policy")


def test_rounding_of_half_precision_is_no_fault(accelerator):
    # one token in fifty differs by more than a standard deviation in SmolLM2-135M
    model = causal_lm("llama", **NO_DROPOUT["llama"]).to(torch.bfloat16)
    pf.check_model(accelerator, model, ROWS, 8, "reward")
    with pytest.raises(SystemExit, match="padding reaches its state"):
        torch.manual_seed(0)
        recurrent = Recurrent(model_config("llama", **NO_DROPOUT["llama"])).to(torch.bfloat16)
        pf.check_model(accelerator, recurrent, ROWS, 8, "reward")


@pytest.mark.parametrize("script", [sft, rm, pf])
def test_all_three_scripts_check_before_they_train(script):
    source = inspect.getsource(script.main)
    assert 0 < source.index("check_model(accelerator, ") < source.index("optimizer.step()")


@pytest.mark.parametrize("noise", ["router_jitter_noise", "attention_dropout"])
def test_noise_of_a_configuration_is_turned_off(accelerator, tmp_path, noise):
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    config = MixtralConfig(vocab_size=43, num_key_value_heads=2, num_local_experts=4, **sizes, **{noise: 0.5})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    pf.check_model(accelerator, pf.load_causal_lm(str(tmp_path)), ROWS, 4, "policy")
    with pytest.raises(SystemExit, match="differs between train and eval mode"):
        noisy = AutoModelForCausalLM.from_pretrained(tmp_path)
        pf.check_model(accelerator, noisy, ROWS, 4, "policy")


# ---------------------------------------------------------------- the cache


class Forgetful(GPT2LMHeadModel):
    """Fills its cache, and then reads the last token alone."""

    def forward(self, *args, past_key_values=None, **kwargs):
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if seen:
            kwargs["attention_mask"] = kwargs["attention_mask"].clone()
            kwargs["attention_mask"][:, :-1] = 0
        return super().forward(*args, past_key_values=past_key_values, **kwargs)


def test_a_cache_that_changes_the_tokens_is_refused(accelerator):
    torch.manual_seed(0)
    model = Forgetful(model_config("gpt2", **NO_DROPOUT["gpt2"]))
    with pytest.raises(SystemExit, match="^--policy: logits with the cache are not those without"):
        pf.check_cache(accelerator, model, ROWS, "policy")


class Drifting(GPT2LMHeadModel):
    """Gives logits with its cache that are a little off: the likeliest token stays the same."""

    def forward(self, *args, past_key_values=None, **kwargs):
        output = super().forward(*args, past_key_values=past_key_values, **kwargs)
        output.logits = output.logits * (1 if past_key_values is None else 1.05)
        return output


class Unwilling(GPT2LMHeadModel):
    """Takes a cache of its own class alone, as some architectures, and says so in two lines."""

    def forward(self, *args, past_key_values=None, **kwargs):
        if past_key_values is not None:
            raise ValueError("not this cache\nbut another one")
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(
    "model_class, message",
    [
        (Drifting, "logits with the cache are not those without; take another model"),
        (Unwilling, "the model cannot be sampled with a cache: not this cache"),
    ],
)
@pytest.mark.parametrize("script", [rm, pf])
def test_a_cache_that_samples_wrongly_or_not_at_all_is_refused_in_a_line(
    accelerator, script, model_class, message
):
    torch.manual_seed(0)
    model = model_class(model_config("gpt2", **NO_DROPOUT["gpt2"]))
    with pytest.raises(SystemExit, match=f"^--model: {message}$"):
        script.check_cache(accelerator, model, ROWS, "model")
    assert not model._forward_hooks


def test_a_recurrent_model_without_attention_is_sampled(accelerator):
    from transformers import Mamba2Config

    sizes = dict(hidden_size=16, num_heads=4, head_dim=8, state_size=8, n_groups=1, num_hidden_layers=2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Mamba2Config(vocab_size=43, chunk_size=8, **sizes)).eval()
    pf.check_model(accelerator, model, ROWS, 4, "policy")
    pf.check_cache(accelerator, model, ROWS, "policy")


def strict(name: str):
    """A model whose forward knows the cache under one name alone, as transformers will from 5.40 on."""
    model = causal_lm("llama")
    inner = model.forward

    def forward(input_ids, attention_mask, position_ids, use_cache, logits_to_keep=0, **caches):
        assert set(caches) <= {name}
        return inner(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            past_key_values=caches.get(name),
        )

    parameters = [
        inspect.Parameter(p, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
        for p in ("input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep", name)
    ]
    forward.__signature__ = inspect.Signature(parameters)
    model.forward = forward
    return model


@pytest.mark.parametrize("script", [rm, pf])
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_goes_under_the_name_of_the_signature(script, name):
    ids, mask = pf.pad_left(ROWS, "cpu")
    expected = script.generate(causal_lm("llama"), ids, mask, 2, 6, 0.0, -1)
    assert script.generate(strict(name), ids, mask, 2, 6, 0.0, -1).tolist() == expected.tolist()


def test_a_cache_that_stays_empty_is_an_error():
    model = causal_lm("gpt2")
    inner = model.forward

    def forward(input_ids, attention_mask, position_ids, use_cache, logits_to_keep, past_key_values):
        return inner(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)

    model.forward = forward
    ids, mask = pf.pad_left(ROWS, "cpu")
    with pytest.raises(RuntimeError, match="GPT2LMHeadModel does not fill the cache"):
        pf.generate(model, ids, mask, 1, 3, 0.0, -1)


@pytest.mark.parametrize("name", ["lfm2", "qwen3_next"])
def test_hybrids_with_linear_attention_are_sampled_as_without_a_cache(accelerator, name):
    # their caches hold states too, which are repeated for N responses and cut when rows stop
    from transformers import AutoConfig

    sizes = dict(vocab_size=43, hidden_size=32, intermediate_size=32, num_hidden_layers=4)
    sizes |= dict(num_attention_heads=2, num_key_value_heads=2, layer_types=None)
    if name == "lfm2":
        sizes["layer_types"] = ["conv", "full_attention"] * 2
    else:
        sizes["layer_types"] = ["linear_attention", "full_attention"] * 2
        sizes |= dict(head_dim=16, linear_num_value_heads=2, linear_num_key_heads=2)
        sizes |= dict(linear_key_head_dim=8, linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2)
        sizes |= dict(moe_intermediate_size=16, shared_expert_intermediate_size=16)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes)).eval()
    rows = [ROWS[2], ROWS[2][1:] + [9], ROWS[2][:1] + [8, 7, 6, 5]]
    pf.check_cache(accelerator, model, rows, "policy")
    ids, mask = pf.pad_left(rows, "cpu")
    tokens = pf.generate(model, ids, mask, 2, 8, 0.0, -1)
    stopped = pf.generate(model, ids, mask, 2, 8, 0.0, int(tokens[0, 1]))  # some rows leave early
    there, _ = pf.stop_masks(tokens, int(tokens[0, 1]), 0)
    assert stopped.tolist() == tokens.masked_fill(~there, 0).tolist()


# ---------------------------------------------------------------- files of models


def test_a_folder_whose_weights_do_not_fill_the_model_is_refused_with_their_names(tmp_path):
    model = causal_lm("llama")
    model.save_pretrained(tmp_path)
    model.config.num_hidden_layers = 3
    model.config.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=r"^--policy .*no weights for .*layers\.2\."):
        pf.load_causal_lm(str(tmp_path), field="policy")


@pytest.mark.parametrize("name", ["gpt2", "llama"])  # tied and untied: one would load, with the head of none
def test_a_reward_model_is_no_policy(tmp_path, name):
    rm.as_classifier(reward_model(name)).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="^--policy .*ForSequenceClassification is no causal language model"):
        pf.load_causal_lm(str(tmp_path), field="policy")


def test_a_torn_file_of_weights_is_refused_with_its_path(tmp_path):
    causal_lm("gpt2").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(SystemExit, match=f"^--model {tmp_path}: ") as refusal:
        sft.load_causal_lm(str(tmp_path))
    assert "\n" not in str(refusal.value)


def test_a_weight_of_another_shape_is_refused(tmp_path):
    causal_lm("gpt2").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["transformer.wpe.weight"] = torch.zeros(3, 32)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="^--model ") as refusal:
        sft.load_causal_lm(str(tmp_path))
    assert "\n" not in str(refusal.value)


def test_a_missing_tokenizer_is_refused_with_its_path(tmp_path):
    causal_lm("gpt2").save_pretrained(tmp_path)
    args = sft.Args(model=str(tmp_path), train_data="rows.jsonl", output_dir=str(tmp_path / "run"))
    with pytest.raises(SystemExit, match=f"^--model {tmp_path}: "):
        sft.main(args)


def test_a_head_reads_the_width_that_the_backbone_gives():
    from transformers import OPTConfig, OPTForCausalLM

    sizes = dict(hidden_size=32, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2, vocab_size=43)
    model = OPTForCausalLM(OPTConfig(num_attention_heads=2, do_layer_norm_before=False, **sizes))
    ids, mask = pf.pad_left(ROWS, "cpu")
    assert pf.RewardModel(model.base_model)(ids, mask).shape == ids.shape


def test_layers_stand_for_what_they_are():
    # a head that is a module is what `column_outputs` tells a reward model by
    model = causal_lm("gpt2")
    ids, mask = pf.pad_left(ROWS, "cpu")
    assert pf.column_outputs(model, ids, mask).shape == (3, 11, len(make_tokenizer()))
    assert isinstance(reward_model().scalar_head, nn.Linear)
    assert pf.column_outputs(reward_model(), ids, mask).shape == (3, 11)
