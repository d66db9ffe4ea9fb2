#!/usr/bin/env bash
# Policies trained in several ways from one dense policy, set beside each other on the same episodes.
#   bash benchmarks/study.sh main|few-tokens|frozen-vision|ablations [FOLDER]
#   with SEEDS="0 1 2" STEPS=300 EPISODES=100 BASE=tiny_metaworld WORKERS=2 in the environment, these being the defaults
# The ways are lines of benchmarks/ways/*.txt. Hours on 2 cores; what is done with the same options is not done again.
# The table is FOLDER/compare/compare.md.
set -euo pipefail

HERE=$(cd "$(dirname "$0")" && pwd)
WAYS=$HERE/ways/$1.txt
OUT=${2:-outputs/$1}
export BASE=${BASE:-tiny_metaworld} STEPS=${STEPS:-300}
SEEDS=${SEEDS:-0 1 2} EPISODES=${EPISODES:-100}
WORKERS=${WORKERS:-2} # one-thread jobs side by side use a small machine better than one job with more threads
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=PASSIVE
mkdir -p "$OUT"
cd "$OUT"

ways() { grep -v '^#' "$WAYS"; }

train() {
    set -euo pipefail
    IFS='|' read -r seed name options <<<"$1"
    local run="${name// /}-s$seed"
    local asked="$BASE $STEPS steps$options"
    [ "$(cat "$run/done" 2>/dev/null)" = "$asked" ] && exit
    rm -rf "$run"
    # shellcheck disable=SC2086
    lerobot-grids fit --policy "$BASE" --dataset demonstrations $options --steps "$STEPS" --seed "$seed" --model.lr 5e-4 \
        --data.max_val_frames 64 --trainer.enable_progress_bar false --output "$run" >"$run.log" 2>&1
    echo "$asked" >"$run/done"
    echo "$(date +%T) $run"
}
export -f train

[ -e demonstrations ] ||
    lerobot-grids record --config "$HERE/../examples/metaworld/record.yaml" --output demonstrations
for seed in $SEEDS; do
    ways | sed "s/^/$seed|/"
done | tr '\n' '\0' | xargs -0 -P "$WORKERS" -I{} bash -c 'train "$1"' train {}
compared=()
for name in $(ways | cut -d'|' -f1); do
    runs=$(printf "$name-s%s," $SEEDS)
    compared+=("$name=${runs%,}")
done
lerobot-grids compare "${compared[@]}" --episodes "$EPISODES" --workers "$WORKERS" --output compare
