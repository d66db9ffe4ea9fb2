#!/usr/bin/env bash
# How the policy `tiny_metaworld` was trained: bash benchmarks/base.sh [FOLDER]
# About 20 minutes on 2 cores. The result is FOLDER/base/pretrained_model.
set -euo pipefail

OUT=${1:-outputs/base}
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
TASKS=push-v3,coffee-push-v3

[ -e "$OUT/demonstrations" ] ||
    lerobot-grids record --output "$OUT/demonstrations" --tasks "$TASKS" --episodes 100
lerobot-grids fit --policy tiny --tokens dense --dataset "$OUT/demonstrations" --steps 4000 --output "$OUT/base"
lerobot-grids eval --policy "$OUT/base" --tasks "$TASKS" --episodes 100 --output "$OUT/eval"
