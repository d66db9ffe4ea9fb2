#!/usr/bin/env bash
# Study of training with few tokens: {task loss, + distillation} x {constant, cosine, elastic} at 4 and 16 tokens,
# with the dense policy trained on for as long as a control. What is done is not done again.
#   bash benchmarks/training.sh DATASET BASE [FOLDER]
# DATASET: a folder made by `lerobot-grids record`; BASE: a dense policy trained on it.
set -euo pipefail

export DATASET=$1 BASE=$2 OUT=${3:-outputs/training}
export STEPS=${STEPS:-150} EPISODES=${EPISODES:-30} SEEDS=${SEEDS:-0 1 2}
export RESULTS=${RESULTS:-$(dirname "$0")/results/training}
WORKERS=${WORKERS:-2} # one-thread jobs side by side use a small machine better than one job with more threads
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
mkdir -p "$OUT" "$RESULTS"

# name | tokens | further options of fit | budgets to evaluate
variants() {
    for distill in 0 0.5; do
        local suffix=$([ "$distill" = 0 ] && echo task || echo distilled)
        for tokens in 4 16; do
            echo "constant$tokens-$suffix|$tokens|--distill $distill|$tokens"
            echo "cosine$tokens-$suffix|$tokens|--distill $distill --budget cosine|$tokens"
        done
        echo "elastic-$suffix|16|--distill $distill --budget elastic|4 16"
    done
    echo "dense|dense||dense"
}

study() {
    set -euo pipefail
    IFS='|' read -r name tokens options budgets <<<"$1"
    local run="$OUT/$name" seed=${name##*-s}
    if [ "$name" = base ]; then
        run=$BASE
    elif [ ! -e "$run/done" ]; then
        rm -rf "$run"
        # shellcheck disable=SC2086
        lerobot-grids fit --policy "$BASE" --dataset "$DATASET" --tokens "$tokens" $options --steps "$STEPS" \
            --model.lr 5e-4 --seed "$seed" --data.max_val_frames 64 --trainer.enable_progress_bar false --output "$run" >"$run.log" 2>&1
        touch "$run/done"
    fi
    for budget in $budgets; do
        local result="$RESULTS/$name-k$budget" at=()
        [ "$budget" = dense ] || at=(--tokens "$budget")
        [ -e "$result.eval.json" ] || lerobot-grids eval --policy "$run" "${at[@]}" --tasks push-v3,coffee-push-v3 --episodes "$EPISODES" --videos 0 \
            --output "$OUT/eval/$name-k$budget" --json "$result.eval.json" >"$OUT/$name.eval.log" 2>&1
        [ -e "$result.validate.json" ] || lerobot-grids validate --policy "$run" --teacher "$BASE" --dataset "$DATASET" \
            "${at[@]}" --frames 128 --json "$result.validate.json" >"$OUT/$name.validate.log" 2>&1
    done
    echo "$(date +%T) $name"
}
export -f study

{
    echo "base|||dense" # as it is, untrained any further
    for seed in $SEEDS; do
        variants | sed "s/|/-s$seed|/"
    done
} | tr '\n' '\0' | xargs -0 -P "$WORKERS" -I{} bash -c 'study "$1"' study {}
