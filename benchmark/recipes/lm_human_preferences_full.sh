#!/usr/bin/env bash
# The full-size lm-human-preferences experiment: gpt2 (124M), the published labels, book queries, 8 processes,
# the published hyperparameters (all of them are the preset's values). Not run by us: it needs 8 GPUs and the
# hub. `--dry_run` behind one of the two lines checks it.
#
#   bash benchmark/recipes/lm_human_preferences_full.sh [sentiment|descriptiveness] [ROOT] [SEED]
#
# What the published runs took:
# - openai/lm-human-preferences (README): "tested on GCE machines with 8 V100s", the 124M model only. The
#   Hugging Face authors found that it needs 8 x V100 of 32 GB (AWS p3dn.24xlarge): it runs out of memory on
#   16 GB and on one GPU (huggingface.co/blog/the_n_implementation_details_of_rlhf_with_ppo, "A note on
#   running openai/lm-human-preferences"). Its sentiment run logs elapsed/time = 16212 s, 4.5 hours
#   (vwxyzjn/lm-human-preference-details, README, run ckg9d00z).
# - vwxyzjn/lm-human-preference-details: 8 GPUs and 64 CPU cores per run, 10 seeds per task
#   (benchmark/benchmark_core.sh at ccc1953), on Hugging Face's A100 cluster (README, acknowledgement). It
#   states no time.
# Work: 156 reward steps of 32 labels; 1953 updates of 512 episodes of 24 tokens, 4 optimizer steps each.
# float32, as there.
#
# Departures from the published runs:
# - The queries are the first file of bookcorpus, each row cut at 24 tokens (lm-human-preference-details too,
#   which streams all of it; OpenAI's own passages of up to 64 tokens between two full stops are lost).
# - 512 samples over all processes behind each normalisation, as in OpenAI's runs; lm-human-preference-details
#   draws 512 per process.
# - Rewards and advantages are whitened over all processes, so that one command is one algorithm on 1 or 8
#   GPUs; both published codes whiten per process.
set -euo pipefail
TASK=${1:-sentiment}
ROOT=${2:-output/lmhp_full}
SEED=${3:-1}
cd "$(dirname "$0")/../.."

LABELS=$ROOT/labels/$TASK/offline_5k.json
BOOKS=$ROOT/books/plain_text/train/0000.parquet

hf download vwxyzjn/lm-human-preferences "$TASK/offline_5k.json" --repo-type dataset \
    --local-dir "$ROOT/labels"
hf download bookcorpus/bookcorpus plain_text/train/0000.parquet --repo-type dataset \
    --revision refs/convert/parquet --local-dir "$ROOT/books"

# stage 2, reward model: 4992 best-of-4 labels, normalised on 512 samples before and after
accelerate launch --multi_gpu --num_processes 8 rm_single.py --preset lm_human_preferences --model gpt2 \
    --train_data "$LABELS" --normalize_prompts "$BOOKS" --prompt_field text --seed "$SEED" \
    --output_dir "$ROOT/$TASK/reward_$SEED"

# stage 3, policy: a million episodes
accelerate launch --multi_gpu --num_processes 8 pfppo_single.py --preset lm_human_preferences --policy gpt2 \
    --reward "$ROOT/$TASK/reward_$SEED/model" --prompts "$BOOKS" --prompt_field text --query_length 24 \
    --seed "$SEED" --output_dir "$ROOT/$TASK/policy_$SEED"
