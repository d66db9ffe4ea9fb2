#!/usr/bin/env bash
# Two policies under every kind and severity of perturbation, and with each input spoiled.
#   bash benchmarks/perturbed.sh FOLDER NAME=CHECKPOINT NAME=CHECKPOINT       with EPISODES=25 WORKERS=2
# The table is FOLDER/perturbed.md, by benchmarks/perturbed_table.py.
set -euo pipefail

HERE=$(cd "$(dirname "$0")" && pwd)
OUT=$1
shift
EPISODES=${EPISODES:-25} WORKERS=${WORKERS:-2}
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=PASSIVE

compare() {
    local name=$1
    shift
    [ -e "$OUT/$name/compare.json" ] ||
        lerobot-grids compare "$@" --episodes "$EPISODES" --workers "$WORKERS" --costs false --output "$OUT/$name" >/dev/null
    echo "$(date +%T) $name"
}
compare none "$@"
for kind in camera light background noise robot layout instruction; do
    for severity in 1 2 3; do
        compare "$kind-$severity" "$@" --perturb "$kind:$severity"
    done
done
for input in image patches tokens instruction state; do
    compare "tamper-$input" "$@" --tamper "$input"
done
python "$HERE/perturbed_table.py" "$OUT"
