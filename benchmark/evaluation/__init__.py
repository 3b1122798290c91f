"""Results on HumanEval, MBPP, LeetCode, GSM8K, Ape210K, CMATH and the embedded world (`evaluate`); how the
program in an output is found (`programs`), and how its final answer is read and compared (`answers`)."""
