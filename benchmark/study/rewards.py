"""Rewards of the study as `module:function@SOURCE`: a learned reward with a controlled noise, or centred per
prompt.

Called as pfppo_single.py calls a reward: (prompts, responses, rows) -> one float per response, the responses
of a prompt adjacent.
"""

import hashlib
import itertools

import numpy as np

from benchmark.rewards import orm


def learned(prompts: list[str], responses: list[str], rows: list[dict], source: str) -> list[float]:
    """R_φ of texts. `source`: folder of rm_single.py."""
    return orm(prompts, responses, rows, source, batch_size=64)


def text_noise(prompt: str, response: str) -> float:
    """A standard normal number fixed by the text: like a model's error it is the same whenever the text comes
    up."""
    seed = hashlib.sha256(f"{prompt}\0{response}".encode()).digest()[:8]
    return float(np.random.default_rng(int.from_bytes(seed, "big")).standard_normal())


def middle_noise(reward: float, noise: float, deviation: float) -> float:
    """R + deviation · (1 - R²) · noise for R in [-1, 1]: largest in the middle of the range, nothing at its
    ends."""
    return reward + deviation * (1 - reward**2) * noise


def noisy(prompts: list[str], responses: list[str], rows: list[dict], source: str) -> list[float]:
    """`learned` with noise in the middle of its range. `source`: FOLDER,DEVIATION."""
    folder, _, deviation = source.rpartition(",")
    rewards = learned(prompts, responses, rows, folder)
    return [
        middle_noise(r, text_noise(p, y), float(deviation)) for r, p, y in zip(rewards, prompts, responses)
    ]


def centre(rewards: list[float], sizes: list[int]) -> list[float]:
    """Adjacent groups of the given sizes, each minus its mean; a group of one is left as it is."""
    out, first = [], 0
    for size in sizes:
        group = np.array(rewards[first : first + size])
        out += (group - group.mean() if size > 1 else group).tolist()
        first += size
    return out


def centred(prompts: list[str], responses: list[str], rows: list[dict], source: str) -> list[float]:
    """`learned` minus its mean over the responses of the same prompt (one response: left as it is, so
    evaluation still means something). Ranks within a prompt do not change; which reward counts as high does.
    `source`: folder of rm_single.py."""
    sizes = [len(list(group)) for _, group in itertools.groupby(rows, key=id)]
    return centre(learned(prompts, responses, rows, source), sizes)
