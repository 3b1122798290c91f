"""Writes a reward model that an older version saved (backbone and reward_head.safetensors) in today's form.

  python -m benchmark.recipes.convert_reward_model OLD NEW

OLD stays as it is. NEW is a sequence classification model with one label, as rm_single.py saves one: the same
weights and tokenizer, and the same scores bit for bit.
"""

import sys
from pathlib import Path

from safetensors import safe_open
from transformers import AutoModel

import rm_single as rm


def load_old(folder: Path) -> rm.RewardModel:
    """Reward model of a folder of the older form."""
    config = rm.load_config(str(folder), "OLD")
    with safe_open(folder / "reward_head.safetensors", "pt") as file:
        head = {name: file.get_tensor(name) for name in file.keys()}
        bound = file.metadata()["bound"]
    model = rm.RewardModel(AutoModel.from_pretrained(folder, config=config, dtype="auto"), bound)
    model.scalar_head.weight.data.copy_(head["scalar_head.weight"])
    model.scalar_head.bias.data.copy_(head["scalar_head.bias"])
    rm.set_gain_and_bias(model, head["reward_gain"].item(), head["reward_bias"].item())
    return model


def convert(old: Path, new: Path) -> None:
    where, there = f"{old}: no reward_head.safetensors", (old / "reward_head.safetensors").is_file()
    rm.refuse(
        (not there, f"{where}; give a folder of a reward model that an older version saved"),
        (new.exists(), f"{new} is there already; name a new folder"),
    )
    accelerator = rm.start_accelerator()
    tokenizer = rm.load_pretrained("AutoTokenizer", str(old), "OLD")
    stop_id = -1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    new.parent.mkdir(parents=True, exist_ok=True)
    rm.save_model(accelerator, rm.as_classifier(load_old(old)), tokenizer, stop_id, new)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m benchmark.recipes.convert_reward_model OLD NEW")
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"wrote {sys.argv[2]}")
