"""What PF-PPO is compared with: RAFT, BOND, DPO, IPO, KTO and Iterative-DPO, and the search for their
learning rates (`tune`)."""
