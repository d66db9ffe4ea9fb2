#!/usr/bin/env bash
# How the policy `tiny_metaworld` was trained: bash benchmarks/base.sh [FOLDER]
# About 45 minutes on one core and a bit. The result is FOLDER/base/pretrained_model.
set -euo pipefail

OUT=${1:-outputs/base}
RECIPES=$(dirname "$0")/../examples/metaworld
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

[ -e "$OUT/demonstrations" ] || lerobot-grids record --config "$RECIPES/record.yaml" --output "$OUT/demonstrations"
lerobot-grids fit --config "$RECIPES/dense.yaml" --dataset "$OUT/demonstrations" --output "$OUT/base"
lerobot-grids eval --policy "$OUT/base" --episodes 100 --output "$OUT/eval"
