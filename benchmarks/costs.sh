#!/usr/bin/env bash
# Every FLOP in the README: bash benchmarks/costs.sh. With a device, its milliseconds too: bash benchmarks/costs.sh cpu
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=benchmarks/results/bench
if [ $# -eq 0 ]; then
    lerobot-grids bench --policy pi0 --tokens 4,16,64 --cameras 2 --resolution 112,56 --json $OUT/pi0-2.json \
        --picture docs/bench.png
    lerobot-grids bench --policy pi0 --tokens 16 --cameras 3 --json $OUT/pi0-3.json
    lerobot-grids bench --policy pi05 --tokens 16 --cameras 2 --json $OUT/pi05-2.json
    lerobot-grids bench --policy pi0_fast --tokens 16 --cameras 2 --json $OUT/pi0_fast-2.json
    lerobot-grids bench --policy smolvla --tokens 16 --cameras 2 --json $OUT/smolvla-2.json
else
    lerobot-grids bench --policy pi0 --tokens 16 --cameras 2 --device "$1" --warmup 1 --repeats "${REPEATS:-3}" \
        --json "$OUT/pi0-2-$1.json"
fi
