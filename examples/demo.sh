#!/usr/bin/env bash
# Compress a policy from 144 to 16 visual tokens and test whether it still works, offline and on a CPU. `tiny_metaworld` is
# in the package. The demonstrations are recorded here. `make demo` runs this script.
set -euo pipefail

OUT=${1:-outputs/demo}
STEPS=${STEPS:-300}       # training steps of the compression
TRIALS=${TRIALS:-25}      # evaluation episodes of each task

export HF_HUB_OFFLINE=1 # nothing is downloaded
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # two processes run beside each other
if [ -e "$OUT" ]; then
    echo "$OUT already exists; remove it, or give another folder: bash examples/demo.sh FOLDER" >&2
    exit 1
fi
start=$SECONDS

say() { printf '\n== %s ==\n' "$1"; }

say "1/4  record demonstrations of a scripted expert"
# The policy in the package was trained on the same demonstrations: 100 episodes of each of four tasks.
lerobot-grids record --config "$(dirname "$0")/metaworld/record.yaml" --output "$OUT/demonstrations"

# Beside the rest: a policy that sees no image, which is the floor, and the policy with all tokens.
measure_yardsticks() {
    lerobot-grids fit --policy tiny --reducer blind --dataset "$OUT/demonstrations" --steps 1000 --output "$OUT/blind"
    lerobot-grids eval --policy tiny_metaworld --episodes "$TRIALS" --videos 0 --output "$OUT/eval/tiny_metaworld"
    lerobot-grids eval --policy "$OUT/blind" --episodes "$TRIALS" --videos 0 --output "$OUT/eval/blind"
}
measure_yardsticks >"$OUT/yardsticks.log" 2>&1 &
yardsticks=$!
trap 'pkill -P $yardsticks 2>/dev/null || true' EXIT

say "2/4  compress the trained policy: 16 sampled visual tokens per image instead of 144"
# First, on 512 frames, the sampler learns where the policy with all tokens looks. Then everything is trained.
lerobot-grids fit --policy tiny_metaworld --tokens 16 --dataset "$OUT/demonstrations" --model.look_first 512 \
    --steps "$STEPS" --model.lr 5e-4 --output "$OUT/grids16"

say "3/4  validate other numbers of tokens on held-out demonstrations"
lerobot-grids validate --policy "$OUT/grids16" --teacher tiny_metaworld --dataset "$OUT/demonstrations" \
    --tokens 1,4,8,16 --picture "$OUT/tokens.png"

say "4/4  evaluate in simulation"
lerobot-grids eval --policy "$OUT/grids16" --episodes "$TRIALS" --videos 1 --output "$OUT/eval/grids16"
wait $yardsticks || { tail -n 3 "$OUT/yardsticks.log" >&2; exit 1; }

say "success of $TRIALS episodes per task"
python "$(dirname "$0")/summary.py" "$OUT"/eval/{tiny_metaworld,grids16,blind}/result.json
echo "where it looks: $OUT/eval/grids16/looks.png and the films beside it"
echo "total: $(((SECONDS - start) / 60)) min $(((SECONDS - start) % 60)) s"
