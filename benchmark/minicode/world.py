"""Writes a world: its splits, a tokenizer trained on its demonstrations, a model configuration, a record."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from benchmark.minicode.operations import OPERATIONS
from benchmark.minicode.problems import SHARES, World, faulty_operations, make_rows
from benchmark.records import write_rows


def make_tokenizer(texts, vocab_size):
    """A BPE tokenizer trained on `texts` that splits only at newline, `;`, `,` and single digits; no BOS.

    Its alphabet is that of the whole operation table, so that no prompt of any world holds an unknown
    character.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    table = [text for op in OPERATIONS.values() for text in op.phrasings + op.correct + op.wrong]
    alphabet = sorted(set("".join(table) + "# \ndef f(x):\n    x = return;,0123456789") - set("{}"))
    specials = ["<pad>", "<eos>", "<unk>"]
    smallest = len(alphabet) + len(specials)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest} (one per character), got {vocab_size}")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\n;,0-9]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def write_world(output_dir, seed=1, **settings):
    """Write the world `World(seed, **settings)` into the folder `output_dir` and return its path.

    The folder appears complete or not at all: files are written to `output_dir`.partial, which is then
    renamed. A folder that already holds this very world is left as it is; one that holds anything else raises
    FileExistsError.
    """
    world = World(seed=seed, **settings)
    output_dir = Path(output_dir).absolute()
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        record = output_dir / "world.json"
        if record.is_file() and json.loads(record.read_text())["settings"] == asdict(world):
            return output_dir
        raise FileExistsError(f"{output_dir} holds something else: choose another output_dir or remove it")
    partial = output_dir.with_name(output_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        sizes, demonstrations = {}, make_rows(world, "sft")
        for split in ("sft", "sft_valid", "preference", "rl", "valid", "test"):
            rows = demonstrations if split == "sft" else make_rows(world, split, demonstrations)
            sizes[split] = {
                "rows": len(rows),
                "compositions": len({tuple(row["operations"]) for row in rows}),
            }
            if split == "sft":
                sizes[split]["wrong_demonstrations"] = sum(row["mistakes"] > 0 for row in rows) / len(rows)
            write_rows(partial / f"{split}.jsonl", rows)
        from transformers import LlamaConfig  # seconds to import

        tokenizer = make_tokenizer(
            [row["prompt"] + row["response"] for row in demonstrations], world.vocab_size
        )
        tokenizer.save_pretrained(partial / "tokenizer")
        LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=len(tokenizer),
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=160,
            tie_word_embeddings=True,
            max_position_embeddings=256,
            bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ).save_pretrained(partial / "model_config")
        record = {"settings": asdict(world), "shares": SHARES, "faulty_operations": faulty_operations(world)}
        record["sizes"] = sizes
        (partial / "world.json").write_text(json.dumps(record, indent=2) + "\n")
        os.rename(partial, output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output_dir
