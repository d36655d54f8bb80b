#!/usr/bin/env bash
#SBATCH --job-name=parallel
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# Learns the first of DOMAINS, then all later ones in parallel, each from the first, and joins them. The
# result is bit-identical to learning them one after another with --branch-from and the first domain.
here=$(dirname "${BASH_SOURCE[0]}")/..
[ -e "$here/train.py" ] || here=${SLURM_SUBMIT_DIR:-.}      # sbatch runs a copy
[ -e "$here/train.py" ] || { echo "error: no train.py in $here: call sbatch in the folder that holds it" >&2; exit 2; }
cd "$here"
source trainer_files/common.sh
read_arguments "Trains on the first of DOMAINS, then on all later ones in parallel with adapters-only, a process each
(with GPUS=N over N GPUs), and joins them; results in OUT/parallel, output in log.txt of each step." "$@"

method=(--method adapters-only)
read -ra domains <<< "$DOMAINS"
[ ${#domains[@]} -gt 1 ] || refuse "DOMAINS=$DOMAINS: parallel.sh needs two domains or more"
[ "$NODES" -eq 1 ] || refuse "NODES=$NODES: parallel.sh runs on one machine; its processes share GPUS"
out=$OUT/parallel
base_folder=$out/step1-${domains[0]}
set_metric "${method[@]}"
check_data "$out"
run_train "$base_folder" "$(epochs_of 1)" --domains "${domains[0]}" ${first[@]+"${first[@]}"} "${method[@]}"
base=$(state_of "$base_folder")

# Trains the domain of step $1 from the base, on one GPU, and extracts its branch.
learn_branch() {
    local domain=${domains[$1 - 1]} folder=$out/step$1-${domains[$1 - 1]}
    local gpus
    if [ "$GPUS" -gt 1 ]; then      # of those that a scheduler assigned, or of all
        IFS=, read -ra gpus <<< "${CUDA_VISIBLE_DEVICES:-$(seq -s , 0 $((10#$GPUS - 1)))}"
        gpus=("${gpus[@]:0:10#$GPUS}")
        export CUDA_VISIBLE_DEVICES=${gpus[($1 - 2) % ${#gpus[@]}]}
    fi
    GPUS=1 NODES=1 BRANCH=1
    run_train "$folder" "$(epochs_of "$1")" --domains "${domains[0]}" "$domain" --state "$base" "${method[@]}"
    run "$PYTHON" -m mdil branches extract "$(state_of "$folder")" --domain "$domain" --out "$folder/$domain.branch" --overwrite
}

children=() branches=()
for ((step = 2; step <= ${#domains[@]}; step++)); do
    domain=${domains[step - 1]} folder=$out/step$step-${domains[step - 1]}
    branches+=("$folder/$domain.branch")
    if [ -n "$DRY_RUN" ]; then
        (learn_branch "$step")
    else
        mkdir -p "$folder"
        echo "== $domain: output in $folder/log.txt"
        (learn_branch "$step") >> "$folder/log.txt" 2>&1 &
        children+=($!)
    fi
done

signalled= failed=
if [ -z "$DRY_RUN" ]; then
    trap 'signalled=1; kill -USR1 "${children[@]}" 2> /dev/null || true' USR1
    trap 'signalled=1; kill -TERM "${children[@]}" 2> /dev/null || true' TERM INT HUP
    for number in "${!children[@]}"; do
        while :; do
            status=0
            wait "${children[number]}" || status=$?
            kill -0 "${children[number]}" 2> /dev/null || break
        done
        [ "$status" -eq 0 ] || failed="$failed ${domains[number + 1]}"
    done
    trap - USR1 TERM INT HUP
    [ -z "$signalled" ] || interrupted
    [ -z "$failed" ] || { echo "error: not learnt:$failed; see log.txt in the folder of each" >&2; exit 2; }
fi
run "$PYTHON" -m mdil branches add "$base" "${branches[@]}" --out "$out/joined.pth.tar" --overwrite
run "$PYTHON" -m mdil verify "$base" "$out/joined.pth.tar"
evaluate_states "$out/results.json" "$base" "$out/joined.pth.tar"
write_report "$out"
