#!/usr/bin/env bash
# The main job, offline and on a CPU: demonstrations, a dense policy, the same policy with 16 of its 144 visual
# tokens, a policy that sees nothing, and how often each of them succeeds. Run by `make demo`.
set -euo pipefail

OUT=${1:-outputs/demo}
EPISODES=${EPISODES:-100} # demonstrations of each task
STEPS=${STEPS:-1000}      # training steps of the dense policy
TRIALS=${TRIALS:-30}      # evaluation episodes of each task
TASKS=push-v3,coffee-push-v3

export HF_HUB_OFFLINE=1 # nothing is downloaded
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
if [ -e "$OUT" ]; then
    echo "$OUT already exists; remove it, or give another folder: bash examples/demo.sh FOLDER" >&2
    exit 1
fi
start=$SECONDS

say() { printf '\n== %s ==\n' "$1"; }

say "1/5  record demonstrations of a scripted expert"
lerobot-grids record --output "$OUT/demonstrations" --tasks "$TASKS" --episodes "$EPISODES"

say "2/5  train the dense policy: 144 visual tokens per image"
lerobot-grids fit --policy tiny --tokens dense --dataset "$OUT/demonstrations" --steps "$STEPS" --output "$OUT/dense"

say "3/5  compress it: 16 sampled visual tokens per image"
lerobot-grids fit --policy "$OUT/dense" --tokens 16 --dataset "$OUT/demonstrations" --steps $((STEPS * 6 / 10)) \
    --model.lr 5e-4 --output "$OUT/grids16"

say "4/5  train the floor: a policy that sees no image at all"
lerobot-grids fit --policy tiny --reducer blind --dataset "$OUT/demonstrations" --steps "$STEPS" --output "$OUT/blind"

say "5/5  let each act in simulation"
for policy in dense grids16 blind; do
    lerobot-grids eval --policy "$OUT/$policy" --tasks "$TASKS" --episodes "$TRIALS" --output "$OUT/eval/$policy" \
        --videos $([ "$policy" = grids16 ] && echo 2 || echo 0)
done

say "success of $TRIALS episodes per task"
python "$(dirname "$0")/summary.py" "$OUT"/eval/{dense,grids16,blind}/result.json
echo "where it looks: $OUT/eval/grids16/looks.png and the films beside it"
echo "total: $(((SECONDS - start) / 60)) min $(((SECONDS - start) % 60)) s"
