"""What generation and training cannot be faster than, counted by hand."""

import pytest
from transformers import LlamaConfig

from benchmark.study import gpu_speed

CONFIG = LlamaConfig(
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=10,
    tie_word_embeddings=False,
)
ARGS = gpu_speed.Args(prompts=1, query_length=3, response_length=2)


def test_a_generated_token_reads_all_weights_and_the_keys_and_values_before_it():
    # 100 weights of 2 bytes, twice; 5 rows x (3 + 4) columns x keys and values x 2 heads of 2 numbers x 2 bytes
    found = gpu_speed.bounds(CONFIG, ARGS, 100, {"bandwidth": 1.0, "products": 1.0})
    assert found["generate"] == pytest.approx(2 * 2 * 100 + 5 * 7 * 2 * 4 * 2)


def test_a_trained_token_costs_six_operations_a_weight():
    # 1000 weights, 80 of them in each of embedding and output: 3 epochs x 2 kept rows x 5 tokens through two
    # bodies of 840 weights, their 2 response tokens through one output; attention 12 x 8 x 25 / 2 a row and model
    found = gpu_speed.bounds(CONFIG, ARGS, 1000, {"bandwidth": 1.0, "products": 1.0})
    assert found["train"] == pytest.approx(6 * (2 * 840 * 30 + 80 * 12) + 2 * 6 * 12 * 8 * 25 / 2)
