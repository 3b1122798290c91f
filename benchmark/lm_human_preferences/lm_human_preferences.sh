#!/usr/bin/env bash
# Line up with lm-human-preference-details on a recorded world: the trace, both stages over seeds, tables and
# pictures.
#
#   bash benchmark/lm_human_preferences/lm_human_preferences.sh WORLD [ROOT] [RESULTS]
#
# WORLD: folder with model/, queries.jsonl, labels.json, reward_model.safetensors, hyperparameters.json and
# the traces. ROOT: where runs go (default output/lmhp); the same command continues a killed study. RESULTS:
# tables and pictures. SEEDS (default 1-10) and WORKERS (runs at a time, default 1) are environment variables.
# One thread per run; on an idle core a policy run takes about 2 minutes and a reward run about 2.
set -euo pipefail
WORLD=$(realpath "${1:?the folder of the recorded world}")
ROOT=$(realpath -m "${2:-output/lmhp}")
RESULTS=$(realpath -m "${3:-$ROOT/results}")
SEEDS=${SEEDS:-1-10}
WORKERS=${WORKERS:-1}
export OMP_NUM_THREADS=1
cd "$(dirname "$0")/../.."

# 1. the same numbers from the same samples
python benchmark/compare_reference.py "$WORLD"

# 2. the reward stage: 4992 best-of-4 labels, 8 a step
RUN=(python -m benchmark.lm_human_preferences.run --root "$ROOT" --seeds "$SEEDS" --workers "$WORKERS")
"${RUN[@]}" --name reward -- \
    accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    rm_single.py --preset lm_human_preferences --model "$WORLD/model" --train_data "$WORLD/labels.json" \
    --normalize_prompts "$WORLD/queries.jsonl" --prompt_field text --batch_size 8 --lr 0.002 --eval_every 78 \
    --seed {seed} --output_dir {output_dir}

# 3. the policy stage (the steady setting); every seed uses the recorded reward model, as the recorded runs do
python -m benchmark.lm_human_preferences.import_reference "$WORLD" "$ROOT/recorded_reward_model"
"${RUN[@]}" --name policy_steady -- \
    accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    pfppo_single.py --preset lm_human_preferences --policy "$WORLD/model" \
    --reward "$ROOT/recorded_reward_model" --prompts "$WORLD/queries.jsonl" --prompt_field text \
    --query_length 24 --batch_size 64 --minibatch_size 64 --total_episodes 7680 --lr 0.00025 \
    --stop_token 4 --kl_target 3 --kl_horizon 2000 --print_samples_every 0 --checkpoint_every 40 \
    --seed {seed} --output_dir {output_dir}

# 4. the same curves from the same settings
BANDS=benchmark/lm_human_preferences/reference
for NAME in reward policy_steady; do
    python -m benchmark.lm_human_preferences.plot --runs "$ROOT/$NAME" --bands "$BANDS/bands_$NAME.json" \
        --output_dir "$RESULTS"
done
