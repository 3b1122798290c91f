"""The folder that is made from a GGUF file: its end-of-sequence token is set, whatever the file says."""

import importlib.util

import pytest
import torch
from conftest import causal_lm, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from benchmark.recipes import smollm2


@pytest.fixture
def gguf(tmp_path, monkeypatch):
    """A file that is read as a tiny Llama whose tokenizer names <|im_start|> as the end of a sequence, as
    transformers has done."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_start|>"
    model = causal_lm("llama", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model.config.quantization_config = {"quant_method": "gguf"}
    read_model, read_tokenizer = AutoModelForCausalLM.from_pretrained, AutoTokenizer.from_pretrained

    def model_of(path, gguf_file=None, **settings):
        return model if gguf_file else read_model(path, **settings)

    def tokenizer_of(path, gguf_file=None, **settings):
        return tokenizer if gguf_file else read_tokenizer(path, **settings)

    monkeypatch.setattr(smollm2.AutoModelForCausalLM, "from_pretrained", model_of)
    monkeypatch.setattr(smollm2.AutoTokenizer, "from_pretrained", tokenizer_of)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    return file


def test_responses_end_where_the_chat_template_ends_them(gguf, tmp_path, capsys):
    folder = tmp_path / "folder"
    smollm2.main([str(gguf), str(folder)])
    assert "eos <|im_end|>" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == ends
    assert model.config.eos_token_id == GenerationConfig.from_pretrained(folder).eos_token_id == ends
    assert getattr(model.config, "quantization_config", None) is None
    assert model.dtype == torch.bfloat16 and tokenizer.chat_template


def test_a_folder_that_is_there_is_not_written_over(gguf, tmp_path):
    with pytest.raises(SystemExit, match="is there already; name a new folder"):
        smollm2.convert(gguf, tmp_path)


def test_a_model_without_those_tokens_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="has no <|im_end|>; this recipe is for SmolLM2-Instruct"):
        smollm2.set_eos(make_tokenizer())


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        SystemExit, match=r"^reading a GGUF file needs a package: pip install -e '.\[recipes\]'$"
    ):
        smollm2.convert(tmp_path / "model.gguf", tmp_path / "new")


def test_what_is_no_gguf_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(SystemExit, match="model.gguf: no such file"):
        smollm2.convert(tmp_path / "model.gguf", tmp_path / "new")
    (tmp_path / "model.gguf").write_bytes(b"hello")
    with pytest.raises(SystemExit, match="model.gguf: not a GGUF file of a language model") as error:
        smollm2.convert(tmp_path / "model.gguf", tmp_path / "new")
    assert "\n" not in str(error.value)
