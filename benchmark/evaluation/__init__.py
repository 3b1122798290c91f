"""Results on HumanEval, MBPP, LeetCode, GSM8K, Ape210K, CMATH and the embedded world (`evaluate`), and how
answers are read (`answers`)."""
