"""Turn a recorded world of lm-human-preference-details into the files our scripts read.

  python -m benchmark.lm_human_preferences.import_reference FOLDER OUTPUT_DIR

FOLDER holds `model/` (a causal language model with its tokenizer) and `reward_model.safetensors` (the peer's
reward model: a whole causal language model under `lm_backbone.`, a `scalar_head`, `reward_gain` and
`reward_bias`). OUTPUT_DIR becomes a reward folder as rm_single.py writes it. Queries and labels need no
conversion: `--prompts` (PPO) or `--normalize_prompts` (reward model) FOLDER/queries.jsonl, `--train_data
FOLDER/labels.json`.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer

from pfppo_single import RewardModel, load_causal_lm, refuse, save_model, start_accelerator
from rm_single import as_classifier


def reward_names(causal_lm: nn.Module) -> dict[str, str | None]:
    """Recorded name -> our name of every reward-model parameter; None for those that no score depends on (an
    untied output layer).

    The peer scores with the last hidden state of a whole causal language model, ours is its bare backbone.
    Which parameters both have is found by identity, so this holds for every architecture, tied or not."""
    ours = {id(p): f"lm_backbone.{name}" for name, p in causal_lm.base_model.named_parameters()}
    names = {f"lm_backbone.{name}": ours.get(id(p)) for name, p in causal_lm.named_parameters()}
    own = ("scalar_head.weight", "scalar_head.bias", "reward_gain", "reward_bias")
    return names | {name: name for name in own}


def load_recorded(model: nn.Module, recorded: dict[str, torch.Tensor], names: dict[str, str | None]) -> None:
    """Copy recorded tensors (by recorded name) into `model`. Raises KeyError for a missing name that we use,
    or an unknown one."""
    missing = {name for name, ours in names.items() if ours is not None} - set(recorded)
    unknown = set(recorded) - set(names)
    if missing or unknown:
        raise KeyError(f"recorded weights lack {sorted(missing)} and have unknown {sorted(unknown)}")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in recorded.items():
            if names[name] is not None:
                parameters[names[name]].copy_(tensor.reshape(parameters[names[name]].shape))


def reward_model_from(
    folder: Path, recorded: dict[str, torch.Tensor], model_class: type = RewardModel
) -> nn.Module:
    """Our reward model with the recorded weights (by recorded name) on the architecture of folder/model."""
    causal_lm = load_causal_lm(str(folder / "model"))
    names = reward_names(causal_lm)
    model = model_class(causal_lm.base_model)
    load_recorded(model, recorded, names)
    return model


def main(folder: Path, output_dir: Path) -> None:
    for needed in ("model/config.json", "reward_model.safetensors"):
        missing = f"{folder / needed}: no such file; give the folder of a recorded world"
        refuse((not (folder / needed).is_file(), missing))
    model = reward_model_from(folder, load_file(folder / "reward_model.safetensors"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    save_model(start_accelerator(), as_classifier(model), tokenizer, -1, output_dir)  # -1: the model's own
    gain, bias = model.reward_gain.item(), model.reward_bias.item()
    print(f"reward folder with gain {gain:.4f} and bias {bias:.4f}: {output_dir}")


if __name__ == "__main__":
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output_dir", type=Path)
    main(**vars(parser.parse_args()))
