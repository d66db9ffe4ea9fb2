#!/usr/bin/env bash
# Every way of having fewer visual tokens, trained from one dense policy and set beside it on the same episodes.
#   bash benchmarks/results.sh [FOLDER]        SEEDS="0 1 2" STEPS=300 EPISODES=100 BASE=tiny_metaworld WORKERS=2
# Hours on 2 cores; what is done is not done again. The table is FOLDER/compare/compare.md; what each reducer does
# without training is in FOLDER/untrained.
set -euo pipefail

RECIPES=$(cd "$(dirname "$0")/../examples/metaworld" && pwd)
OUT=${1:-outputs/results}
export BASE=${BASE:-tiny_metaworld} STEPS=${STEPS:-300}
SEEDS=${SEEDS:-0 1 2} EPISODES=${EPISODES:-100}
WORKERS=${WORKERS:-2} # one-thread jobs side by side use a small machine better than one job with more threads
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=PASSIVE
mkdir -p "$OUT"
cd "$OUT"

# name | options of fit
WAYS="dense|--tokens dense
grids16|--tokens 16
uniform16|--tokens 16 --reducer uniform
pool16|--tokens 16 --reducer pool
random16|--tokens 16 --reducer random
merge16|--tokens 16 --reducer merge
fastv16|--tokens 16 --reducer fastv
sparsevlm16|--tokens 16 --reducer sparsevlm
grids24|--tokens 24
grids4|--tokens 4
grids1|--tokens 1
half-resolution|--tokens dense --resolution 48
third-resolution|--tokens dense --resolution 32
blind|--reducer blind"

train() {
    set -euo pipefail
    IFS='|' read -r seed name options <<<"$1"
    local run="$name-s$seed"
    [ -e "$run/done" ] && exit
    rm -rf "$run"
    # shellcheck disable=SC2086
    lerobot-grids fit --policy "$BASE" --dataset demonstrations $options --steps "$STEPS" --seed "$seed" --model.lr 5e-4 \
        --data.max_val_frames 64 --trainer.enable_progress_bar false --output "$run" >"$run.log" 2>&1
    touch "$run/done"
    echo "$(date +%T) $run"
}
export -f train

[ -e demonstrations ] || lerobot-grids record --config "$RECIPES/record.yaml" --output demonstrations
compared=()
for seed in $SEEDS; do
    sed "s/^/$seed|/" <<<"$WAYS"
done | tr '\n' '\0' | xargs -0 -P "$WORKERS" -I{} bash -c 'train "$1"' train {}
for name in $(cut -d'|' -f1 <<<"$WAYS"); do
    runs=$(printf "$name-s%s," $SEEDS)
    compared+=("$name=${runs%,}")
done
lerobot-grids compare "${compared[@]}" --episodes "$EPISODES" --workers "$WORKERS" --output compare
lerobot-grids compare --config "$RECIPES/untrained.yaml" --episodes "$EPISODES" --workers "$WORKERS" --output untrained
