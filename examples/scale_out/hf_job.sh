#!/bin/bash
# One rented GPU of Hugging Face: bash examples/scale_out/hf_job.sh me/my_robot_data me/so101-smolvla [--dry-run]
# Dataset and policy are on the Hub, because the job's disk is gone afterwards.
set -euo pipefail

DATASET=$1
REPOSITORY=$2
shift 2

hf jobs run "$@" --flavor l4x1 --timeout 12h --secrets HF_TOKEN ghcr.io/astral-sh/uv:python3.12-bookworm \
    uvx --from 'lerobot_policy_grids[smolvla]' \
    lerobot-grids fit --policy lerobot/smolvla_base --tokens 16 --dataset "$DATASET" --push "$REPOSITORY" --push_every 2000 \
    --save_every 2000 \
    --rename_map '{"observation.images.front": "observation.images.camera1", "observation.images.wrist": "observation.images.camera2"}'
