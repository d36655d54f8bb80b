#!/usr/bin/env bash
#SBATCH --job-name=adapters-only
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# Learns DOMAINS one after another with the shared weights frozen after the first: no forgetting, and cheap.
here=$(dirname "${BASH_SOURCE[0]}")/..
[ -e "$here/train.py" ] || here=${SLURM_SUBMIT_DIR:-.}      # sbatch runs a copy
[ -e "$here/train.py" ] || { echo "error: no train.py in $here: call sbatch in the folder that holds it" >&2; exit 2; }
cd "$here"
source trainer_files/common.sh
read_arguments "Trains on DOMAINS one after another with adapters-only; results in OUT/adapters-only." "$@"
learn_sequence adapters-only --method adapters-only
