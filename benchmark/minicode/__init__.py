"""The embedded world: small Python problems on a list of integers, made from a seed, graded by running the
code.

A problem chains one to three of 44 operations (37 list -> list; 7 list -> scalar, which come last). The
prompt is a comment with the instruction and a signature, the response one line per operation:

    # keep above 3; reverse the order
    def f(x):
        x = [v for v in x if v > 3]
        return x[::-1]

Every operation has two or three phrasings, two or three equivalent correct implementations and one to three
plausible mistakes. The demonstrations hold systematic mistakes as real corpora do: some operations are mostly
shown wrong. Compositions are split by a hash of the operations' names, the same in every world, so no
composition that demonstrates, ranks or trains is ever tested. Every choice is made on `valid`; `test` is
looked at once per result. With the world's tokenizer a prompt has about 23 tokens (at most 50), a response
with its end 21 (1 in 2000 over 48).

    python -m benchmark.minicode write --output_dir DIR --seed 1      # every field of World is a flag

leaves `sft sft_valid preference rl valid test` as .jsonl, `tokenizer/`, `model_config/` and `world.json` in
DIR. Rows:
    task_id, prompt, entry_point ("f"), tests (8 assert lines; repr compares types too: True is not 1)
    inputs, outputs         the same tests as data: f(inputs[i]) must give outputs[i]
    operations              names of the composed operations
    canonical_solution      a correct response
    response, mistakes      sft and sft_valid only: the demonstration, and how many of its lines are wrong

From Python:
    write_world(output_dir, seed=1, **fields of World)      deterministic, written aside and renamed
    make_rows(World(seed=1), "valid") -> rows               one split, nothing written
    grade_fast(prompts, responses, rows) -> list[bool]      executes prompt + response in a separate process
    oracle(prompts, responses, rows) -> list[float]         the same as a reward: `benchmark.minicode:oracle`
    build_pairs(rows, responses, passed) -> (pairs, number of prompts dropped)
"""

from benchmark.minicode.grade import grade_fast, oracle
from benchmark.minicode.pairs import build_pairs
from benchmark.minicode.problems import World, make_rows
from benchmark.minicode.world import write_world

__all__ = ["World", "build_pairs", "grade_fast", "make_rows", "oracle", "write_world"]
