#!/bin/bash
# Two machines with four GPUs each: sbatch examples/scale_out/slurm.sh me/my_robot_data outputs/pi0-24 [options of fit]
# srun starts one process for each GPU; --trainer.num_nodes and --trainer.devices have to say the same.
#SBATCH --job-name=grids --time=24:00:00
#SBATCH --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=8
#SBATCH --signal=SIGTERM@120 --requeue --open-mode=append
set -euo pipefail

DATASET=$1
OUTPUT=$2
shift 2

# SIGTERM comes two minutes before the time is up. `fit` saves and ends; a job that starts again resumes.
RESUME=false
if [ -e "$OUTPUT/training_state" ]; then RESUME=true; fi

srun lerobot-grids fit --policy pi0 --tokens 24 --dataset "$DATASET" --output "$OUTPUT" --resume "$RESUME" \
    --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" --trainer.strategy ddp "$@"
