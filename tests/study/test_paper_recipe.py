"""The paper's run as commands: they parse at every size, say the paper's numbers, and preferences are made of graded
samples. `python -m benchmark.recipes.paper --small --run` runs all of them, in minutes."""

import importlib
import json
from pathlib import Path

import pytest
from conftest import tiny_settings

from benchmark.evaluation.evaluate import Args as EvaluateArgs
from benchmark.recipes import paper, preferences
from benchmark.study import scaling


def made(name: str) -> list[paper.Stage]:
    return paper.stages(name, Path("data"), Path("out"))


@pytest.mark.parametrize("name", paper.SIZES)
def test_commands_parse(name):
    for stage in made(name):
        words = paper.flags(stage.settings)
        if stage.name == "pass1":
            import tyro

            tyro.cli(EvaluateArgs, args=words)
            continue
        module = importlib.import_module(stage.script.removesuffix(".py"))
        args = importlib.import_module("pfppo_single").parse_args(module.Args, words)
        importlib.import_module("pfppo_single").check_ranges(args)
        if stage.name == "br":
            module.check_args(args, stage.processes)  # sizes divide


def test_commands_say_the_papers_numbers():
    by_name = {stage.name: stage.settings for stage in made("6.7b")}
    assert (by_name["sft"]["epochs"], by_name["sft"]["lr"]) == (5, 1e-5)
    assert (by_name["rm"]["epochs"], by_name["rm"]["lr"]) == (1, 1e-5)
    ppo = by_name["br"]
    assert (ppo["num_responses"], ppo["lr"], ppo["critic_lr"], ppo["kl_coef"]) == (5, 5e-7, 9e-6, 0.01)
    assert (ppo["noptepochs"], ppo["total_episodes"]) == (3, 5 * 3000 * 5)


def test_stages_follow_each_other():
    # what a stage reads is what an earlier one has written
    by_name, written = {stage.name: stage for stage in made("1.3b")}, set()
    for stage in by_name.values():
        read = {str(x).split("/")[1] for x in stage.settings.values() if str(x).startswith("out/")}
        assert read - {stage.name} <= written
        written.add(stage.name)


def test_small_model_is_a_llama_of_a_few_hundred_thousand_weights():
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**paper.SIZES["small"].config))
    assert 200_000 < sum(x.numel() for x in model.parameters()) < 500_000


def test_one_process_does_not_shard():
    for stage in made("small"):
        words = paper.command(stage, small=True)
        assert ("--shard" in words) == (stage.name in ("sft", "rm", "br"))
        assert ("--multi_gpu" in words) == (stage.processes > 1)


def test_sft_rows_have_one_form():
    rows = paper.sft_rows([{"problem": "p", "solution": "s"}], [{"instruction": "i", "output": "o"}])
    assert rows == [{"prompt": "p", "response": "s"}, {"prompt": "i", "response": "o"}]


GRADER = """
def short(prompts, responses, rows):
    return [float(len(response) < 3) for response in responses]

def never(prompts, responses, rows):
    return [0.0] * len(responses)
"""


@pytest.fixture
def sample(world, tmp_path, module, monkeypatch):
    """sample(grader, **changes) -> folder of a run of benchmark.recipes.preferences."""
    module("graders_of_recipe", GRADER)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    tiny = tiny_settings(world, tmp_path)
    common = {name: tiny[name] for name in ("policy", "prompts", "query_length", "response_length")}

    def run(grader, **changes):
        common["actual_score"] = f"graders_of_recipe:{grader}"
        preferences.main(preferences.Args(output_dir=str(tmp_path / "pairs"), **common, **changes))
        return tmp_path / "pairs"

    return run


def test_pairs_are_a_passing_and_a_failing_sample(sample):
    folder = sample("short", fewest_pairs=2)
    names = ("pairs.jsonl", "valid.jsonl")
    pairs = [json.loads(line) for name in names for line in (folder / name).read_text().splitlines()]
    assert len(pairs) == json.loads((folder / "counts.json").read_text())["pairs"] >= 2
    assert all(len(pair["chosen"]) < 3 <= len(pair["rejected"]) for pair in pairs)


def test_too_few_pairs_are_refused(sample):
    with pytest.raises(SystemExit, match="only 0 of 12 prompts have a passing and a failing sample"):
        sample("never")


# ---------------------------------------------------------------- communication against compute


def test_gathering_takes_the_slower_link():
    machine = scaling.Machine(node=8, inside=300e9, outside=3e9)
    assert scaling.gather_seconds(300e9, 2, machine) == pytest.approx(0.5)  # half of it is there
    assert scaling.gather_seconds(24e9, 16, machine) == pytest.approx(15 / 16)  # eight cards of 3 GB/s


def test_training_seconds_by_hand():
    # 8 operations x 2 models x 1e9 weights x 2 rows x 10 tokens x 3 epochs on a machine of 1e12
    job = scaling.Job(weights=1e9, rows=4, kept=2, epochs=3, query=4, response=6)
    found = scaling.seconds(job, 1, scaling.Machine(flops=1e12))
    assert found["train"] == pytest.approx(0.96)
    assert found["gather whole"] == 0
