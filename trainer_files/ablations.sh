#!/usr/bin/env bash
#SBATCH --job-name=ablations
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# The other rows of the comparison: METHODS, then the published loops as they are and with each
# correction alone (RECIPES: NAME:OPTIONS-OF-TRAIN items, separated by semicolons).
here=$(dirname "${BASH_SOURCE[0]}")/..
[ -e "$here/train.py" ] || here=${SLURM_SUBMIT_DIR:-.}      # sbatch runs a copy
[ -e "$here/train.py" ] || { echo "error: no train.py in $here: call sbatch in the folder that holds it" >&2; exit 2; }
cd "$here"
source trainer_files/common.sh
METRIC=${METRIC:-plain}         # the same for all rows, so that they are comparable
METHODS=${METHODS:-feature-extraction lwf adapters-only series-adapters domain-bn adapters-shared-bn}
RECIPES=${RECIPES-released:--recipe released;released-frozen-bn:--recipe released --old-bn frozen;\
released-kl:--recipe released --distillation kl;released-one-step:--recipe released --steps-per-batch 1;\
released-teacher-eval:--recipe released --teacher-mode eval;released-copied:--recipe released --new-statistics copied}
read_arguments "Trains on DOMAINS with every method of METHODS and every recipe of RECIPES; results in OUT/<name>." "$@"
for method in $METHODS; do
    learn_sequence "$method" --method "$method"
done
IFS=';' read -ra recipes <<< "$RECIPES"
for recipe in ${recipes[@]+"${recipes[@]}"}; do
    # shellcheck disable=SC2086
    learn_sequence "${recipe%%:*}" --method mdil ${recipe#*:}
done
