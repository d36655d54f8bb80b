# Shared by the scripts in this folder: settings from the environment, and functions that run sequences of
# steps. Source this file; do not run it.
set -euo pipefail
set -f          # no globbing: settings are words, not file name patterns

DATA=${DATA:-data}                              # --data-root
PATHS=${PATHS:-}                                # --data items: NAME=PATH ..., such as your own domains
OUT=${OUT:-runs}                                # results go to $OUT/<name>/
DOMAINS=${DOMAINS:-cityscapes BDD IDD}          # in the order to learn them
EPOCHS=${EPOCHS:-}                              # one number, or one for each domain; default: train.py's
BATCH=${BATCH:-}                                # over all GPUs; default: 6, or the next multiple of their number
HEIGHT=${HEIGHT:-512}
WIDTH=${WIDTH:-}                                # default: twice the height
SEED=${SEED:-0}
GPUS=${GPUS:-1}                                 # per machine; torchrun if more than 1
NODES=${NODES:-${SLURM_JOB_NUM_NODES:-1}}       # number of machines
HOST=${HOST:-}                                  # the first of several machines; not needed under SLURM
NODE=${NODE:-${SLURM_NODEID:-0}}                # this machine's number; number 0 evaluates
WORKERS=${WORKERS:-4}
EVALUATE=${EVALUATE:-every}                     # every: after every step; last: after the last only; none: never
ENCODER=${ENCODER:-}                            # ImageNet encoder of ERFNet for the first step
NETWORK=${NETWORK:-}                            # --network of train.py
WEIGHTS=${WEIGHTS:-}                            # --weights of train.py for the first step: imagenet, or a file
RECIPE=${RECIPE:-}                              # --recipe of train.py
SELECT=${SELECT:-best}                          # epoch to evaluate and to continue from: best or last
METRIC=${METRIC:-}                              # plain or published mIoU of eval.py; default: depends on the recipe
TRAIN_ARGS=${TRAIN_ARGS:-}                      # more options of train.py
DRY_RUN=${DRY_RUN:-}

# Prints the settings, as --help does.
show_settings() { cat << END
Settings, from the environment (NAME=value bash $0) or as arguments (NAME=value):
  DATA=$DATA  PATHS="$PATHS" (NAME=PATH of domains in another place, or of your own; docs/data.md)
  OUT=$OUT  DOMAINS="$DOMAINS"  EPOCHS="${EPOCHS:-150}"  BATCH=${BATCH:-6}
  HEIGHT=$HEIGHT  WIDTH=${WIDTH:-twice the height}  SEED=$SEED  WORKERS=$WORKERS
  NETWORK=${NETWORK:-erfnet}  WEIGHTS=${WEIGHTS:-none} (or imagenet, or a file)  ENCODER=$ENCODER (of ERFNet, a file; docs/networks.md)
  GPUS=$GPUS (of each machine)  NODES=$NODES (machines)  HOST=$HOST  NODE=$NODE (docs/several-gpus.md)
  RECIPE=${RECIPE:-corrected} (or released, fast)  SELECT=$SELECT (or last)  METRIC=${METRIC:-plain, or published with --recipe released}
  EVALUATE=$EVALUATE (every: after every step; last: after the last; none)  TRAIN_ARGS="$TRAIN_ARGS"
  PYTHON  interpreter (default: .venv/bin/python, created by trainer_files/setup.sh)
Options: --help, --dry-run (prints the commands), --recipe NAME (as RECIPE=NAME). Finished steps are skipped,
interrupted ones are resumed. Run it directly or under SLURM: sbatch [options] $0
END
}

# Reads NAME=value arguments, --dry-run and --help; $1: what the script does.
read_arguments() {
    local about=$1 argument name
    shift
    while [ $# -gt 0 ]; do
        argument=$1 name=${1%%=*}
        shift
        case $argument in
            --recipe) RECIPE=${1-none}; shift $(($# > 0)) ;;
            --recipe=*) RECIPE=${argument#*=} ;;
            --help|-h) printf '%s\n\n' "$about"; show_settings; exit 0 ;;
            --dry-run) DRY_RUN=1 ;;
            DATA=*|PATHS=*|OUT=*|DOMAINS=*|EPOCHS=*|BATCH=*|HEIGHT=*|WIDTH=*|SEED=*|GPUS=*|NODES=*|HOST=*|NODE=*|WORKERS=*|EVALUATE=*|ENCODER=*|NETWORK=*|WEIGHTS=*|RECIPE=*|SELECT=*|METRIC=*|TRAIN_ARGS=*|PYTHON=*|METHODS=*|RECIPES=*)
                [ -n "${!name+set}" ] || [ "$name" = PYTHON ] || refuse "this script does not read $name; ablations.sh does$([ "$name" = RECIPES ] || echo ', multi_task.sh too')"
                printf -v "$name" '%s' "${argument#*=}" ;;
            DOMAIN=*|EPOCH=*|GPU=*|METHOD=*|PATH=*|WORKER=*) refuse "unknown argument '$argument'; did you mean ${name}S?" ;;
            *) refuse "unknown argument '$argument'; --help lists them" ;;
        esac
    done
    check_words
    check_numbers
    split_setting TRAIN_ARGS train_args
    check_train_args
    set_data
    choose_batch
    [ -n "${PYTHON:-}" ] || [ -n "$DRY_RUN" ] || bash trainer_files/setup.sh
    PYTHON=${PYTHON:-.venv/bin/python}
}

# Prints the error $1 and exits.
refuse() { echo "error: $1" >&2; exit 2; }

# Refuses settings with values that are not allowed; sets the array first.
check_words() {
    local method known
    [ -n "${DOMAINS// /}" ] || refuse "DOMAINS is empty: name the domains to learn, in order"
    [ -n "$DATA" ] || refuse "DATA is empty: name the folder that holds the data sets"
    [ -n "$OUT" ] || refuse "OUT is empty: name the folder that results go to"
    DATA=${DATA/#\~\//$HOME/} OUT=${OUT/#\~\//$HOME/} ENCODER=${ENCODER/#\~\//$HOME/} WEIGHTS=${WEIGHTS/#\~\//$HOME/}
    [ -z "$ENCODER" ] || [ -z "$WEIGHTS" ] || refuse "ENCODER and WEIGHTS both say what the first step starts from; give one"
    first=(${ENCODER:+--state "$ENCODER"} ${WEIGHTS:+--weights "$WEIGHTS"})     # options of train.py, first step only
    case $RECIPE in ''|corrected|released|fast) ;; *) refuse "--recipe $RECIPE is not corrected, released or fast" ;; esac
    case $SELECT in best|last) ;; *) refuse "SELECT=$SELECT is not best or last" ;; esac
    case $EVALUATE in every|last|none) ;; *) refuse "EVALUATE=$EVALUATE is not every, last or none" ;; esac
    # The names in the table of methods, and those that other files add to it.
    known="ours $(find models losses -name '*.py' -exec sed -n \
        "s/^    '\([a-z0-9-]*\)': Method(.*/\1/p; s/^METHODS\['\([^']*\)'\] = .*/\1/p" {} + | tr '\n' ' ')"
    for method in ${METHODS:-}; do
        case " $known " in *" $method "*) ;; *) refuse "METHODS: '$method' is not one of $known" ;; esac
    done
    [ -z "${PYTHON:-}" ] || command -v "$PYTHON" > /dev/null || refuse "PYTHON=$PYTHON is not a program"
    case $METRIC in ''|plain|published) ;; *) refuse "METRIC=$METRIC is not plain or published" ;; esac
}

# Refuses settings that are not numbers. This comes before any arithmetic, because bash would execute code in
# them. Sets WIDTH.
check_numbers() {
    local name word epochs domains least
    read -ra epochs <<< "$EPOCHS"
    read -ra domains <<< "$DOMAINS"
    for name in HEIGHT WIDTH SEED WORKERS GPUS NODES NODE BATCH; do
        least=1
        case $name in
            BATCH|WIDTH) [ -n "${!name}" ] || continue ;;
            SEED|WORKERS|NODE) least=0 ;;
        esac
        is_count "${!name}" "$least" || refuse "$name=${!name} is not a whole number of at least $least"
    done
    for word in ${epochs[@]+"${epochs[@]}"}; do
        is_count "$word" 1 || refuse "EPOCHS=\"$EPOCHS\": '$word' is not a whole number of at least 1"
    done
    [ "${#epochs[@]}" -le 1 ] || [ "${#epochs[@]}" -ge "${#domains[@]}" ] ||
        refuse "EPOCHS=\"$EPOCHS\" has ${#epochs[@]} numbers for ${#domains[@]} domains; give one, or one for each"
    WIDTH=${WIDTH:-$((2 * 10#$HEIGHT))}
    [ "$NODES" -eq 1 ] || [ -n "$HOST" ] || [ -n "${SLURM_JOB_NODELIST:-}" ] ||
        refuse "NODES=$NODES needs HOST=NAME, the first machine; start the script on each, with NODE=0, NODE=1, ..."
    [ "$NODE" -lt "$NODES" ] || refuse "NODE=$NODE of NODES=$NODES: machines are counted from 0"
}

# Whether $1 is a whole number of at least $2, below a billion.
is_count() {
    case $1 in ''|*[!0-9]*|??????????*) return 1 ;; esac
    [ "$1" -ge "$2" ]
}

# Splits the setting $1 into the array $2 as a shell would, respecting quotes, but expands and runs nothing.
split_setting() {
    xargs -r printf '' <<< "${!1}" 2> /dev/null || refuse "$1=${!1}: a quote is not closed"
    mapfile -t "$2" < <(xargs -r printf '%s\n' <<< "${!1}")
}

# Refuses options in TRAIN_ARGS that the scripts set themselves: what follows a step would not know of them.
check_train_args() {
    local option setting
    for option in ${train_args[@]+"${train_args[@]}"}; do
        option=${option%%=*}
        case $option in
            --savedir) setting=OUT ;;
            --data-root|--datadir) setting=DATA ;;
            --data) setting=PATHS ;;
            --dataset*|--num-classes*|--num_classes*|--current[-_]task|--nb[-_]tasks|--finetune|--decoder) setting='DOMAINS and another script' ;;
            --domains|--height|--width|--seed|--network|--weights) setting=${option#--} setting=${setting^^} ;;
            --num-epochs) setting=EPOCHS ;;
            --batch-size) setting=BATCH ;;
            --num-workers) setting=WORKERS ;;
            --state|--pretrainedEncoder) setting=ENCODER ;;
            --parallel) setting=GPUS ;;
            --method) setting='another script, or METHODS of ablations.sh or multi_task.sh' ;;
            --help|-h) refuse "TRAIN_ARGS: $option trains nothing; run train.py $option" ;;
            *) continue ;;
        esac
        refuse "TRAIN_ARGS: the script itself sets $option; use $setting"
    done
}

# Sets the array data: the options that tell train.py, eval.py and the tools where the data is.
set_data() {
    local places place path
    data=(--data-root "$DATA")
    split_setting PATHS places
    for place in ${places[@]+"${places[@]}"}; do
        case $place in ?*=?*) ;; *) refuse "PATHS: '$place' is not NAME=PATH" ;; esac
        path=${place#*=}
        data+=(--data "${place%%=*}=${path/#\~\//$HOME/}")
    done
}

# Sets BATCH unless it is given; refuses one that does not divide equally among the processes, and the domains that
# share a batch.
choose_batch() {
    local processes=$((10#$GPUS * 10#$NODES)) domains parts below among
    parts=$processes among="$processes process$([ "$processes" -eq 1 ] || echo es)"
    case " ${METHODS:-} " in *' multi-task-mixed '*)
        read -ra domains <<< "$DOMAINS"
        parts=$((processes * ${#domains[@]})) among="${#domains[@]} domains in each of $among" ;;
    esac
    if [ -z "$BATCH" ]; then
        BATCH=$(((6 + parts - 1) / parts * parts))
        [ "$BATCH" -eq 6 ] ||
            echo "== BATCH=$BATCH: 6 images do not divide among $among, $((BATCH / processes)) for each do"
    elif [ $((10#$BATCH % parts)) -ne 0 ]; then
        below=$((10#$BATCH / parts * parts))
        refuse "BATCH=$BATCH does not divide among $among; use $([ "$below" -eq 0 ] || echo "$below or ")$((below + parts))"
    fi
}

# Prints a command and, unless it is a dry run, runs it. Passes a signal (SLURM's early warning,
# Ctrl-C, kill) on to it; train.py then finishes its batch, saves and exits, and the script exits with
# status 75. Under SLURM, the job is requeued.
run() {
    printf '+'; printf ' %q' "$@"; printf '\n'
    [ -z "$DRY_RUN" ] || return 0
    local child status=0 signalled=
    "$@" &
    child=$!
    trap 'signalled=1; pass_signal USR1 $child' USR1
    trap 'signalled=1; pass_signal TERM $child' TERM INT HUP
    while :; do
        status=0
        wait "$child" || status=$?
        kill -0 "$child" 2>/dev/null || break
    done
    trap - USR1 TERM INT HUP
    [ -z "$signalled" ] || interrupted
    [ "$status" -eq 0 ] || exit "$status"
}

# Exits after a signal; requeues a SLURM job, but only from the script itself, not from a parallel branch.
interrupted() {
    if [ -z "${BRANCH:-}" ] && [ -n "${SLURM_JOB_ID:-}" ] && command -v scontrol > /dev/null; then
        echo "== interrupted; back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
    elif [ -z "${BRANCH:-}" ]; then
        echo "== interrupted; run the same command again to continue"
    fi
    exit 75
}

pass_signal() { kill -"$1" "$2" 2>/dev/null || true; }

# Sets the array launcher: the command that starts train.py on all GPUS of all NODES, for the step in $1; and the
# array parallel: the option that keeps train.py to one GPU, where GPUS=1. The machines connect to HOST, by default
# the first machine of the SLURM job. A SLURM batch script runs on that machine only, so the launcher starts the
# others with srun; if srun started this script, it already runs on all of them.
set_launcher() {
    local host=$HOST id=mdil-${1//\//-}
    launcher=("$PYTHON") parallel=()
    if [ "$((10#$GPUS * 10#$NODES))" -le 1 ]; then parallel=(--parallel none); return; fi
    launcher+=(-m mdil torchrun --nproc_per_node "$GPUS")
    if [ "$NODES" -eq 1 ]; then launcher+=(--standalone); return; fi
    if [ -z "$host" ]; then
        host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 10000))
        [ -n "${SLURM_STEP_ID:-}" ] || launcher=(srun --nodes "$NODES" --ntasks "$NODES" --ntasks-per-node 1 "${launcher[@]}")
    fi
    # A machine waits up to two hours for the others, which may still be evaluating.
    launcher+=(--nnodes "$NODES" --rdzv_backend c10d --rdzv_endpoint "$host" --rdzv_id "$id"
               --rdzv_conf join_timeout=7200,read_timeout=7200)
}

# Trains one step: run_train SAVEDIR EPOCHS ARGUMENTS...; if EPOCHS is empty, train.py's default applies.
run_train() {
    local savedir=$1 epochs=$2
    shift 2
    set_launcher "$savedir"
    run "${launcher[@]}" train.py --savedir "$savedir" ${epochs:+--num-epochs "$epochs"} --batch-size "$BATCH" \
        "${data[@]}" --height "$HEIGHT" --width "$WIDTH" --seed "$SEED" --num-workers "$WORKERS" --resume \
        ${parallel[@]+"${parallel[@]}"} ${RECIPE:+--recipe "$RECIPE"} ${NETWORK:+--network "$NETWORK"} "$@" \
        ${train_args[@]+"${train_args[@]}"}
}

# The checkpoint of a step that SELECT chooses: state_of SAVEDIR.
state_of() {
    if [ "$SELECT" = last ]; then echo "$1/checkpoint.pth.tar"; else echo "$1/model_best.pth.tar"; fi
}

# Sets the array metric for networks trained with the arguments "$@": METRIC's, or by default the recipe's.
set_metric() {
    metric=()
    case "${METRIC:-by recipe} $* ${RECIPE:+--recipe $RECIPE} $TRAIN_ARGS " in
        plain*|*' --no-published-metric '*) ;;
        published*|*' --recipe released '*|*' --published-metric '*) metric=(--published-metric) ;;
    esac
}

# Epochs of step $1: the only number in EPOCHS, or the step's own.
epochs_of() {
    local all
    [ -n "$EPOCHS" ] || return 0
    read -ra all <<< "$EPOCHS"
    echo "${all[$((${#all[@]} == 1 ? 0 : $1 - 1))]}"
}

# Learns DOMAINS one after another, with results in $OUT/NAME, and evaluates as EVALUATE says:
# learn_sequence NAME ARGUMENTS-OF-TRAIN...
learn_sequence() {
    local name=$1 step=0 domain savedir states=() learnt=() start=()
    shift
    set_metric "$@"
    check_data "$OUT/$name"
    for domain in $DOMAINS; do
        step=$((step + 1))
        learnt+=("$domain")
        savedir=$OUT/$name/step$step-$domain
        start=()
        [ "$step" -eq 1 ] && start=(${first[@]+"${first[@]}"})
        [ "$step" -gt 1 ] && start=(--state "${states[-1]}")
        run_train "$savedir" "$(epochs_of $step)" --domains "${learnt[@]}" ${start[@]+"${start[@]}"} "$@"
        states+=("$(state_of "$savedir")")
        [ "$EVALUATE" != every ] || evaluate_states "$OUT/$name/results.json" "${states[@]}"
    done
    [ "$EVALUATE" != last ] || evaluate_states "$OUT/$name/results.json" "${states[@]}"
    write_report "$OUT/$name"
}

# Writes the report about a folder of runs, on the first machine only.
write_report() { [ "$NODE" -gt 0 ] || run "$PYTHON" -m mdil report "$1" "${data[@]}"; }

# Refuses unknown domains and missing images before the first step, for the steps that have not begun: check_data FOLDER.
check_data() {
    local step=0 domain ahead=()
    for domain in $DOMAINS; do
        step=$((step + 1))
        [ -e "$1/step$step-$domain/opts.json" ] || [ -e "$1/$domain/opts.json" ] || ahead+=("$domain")
    done
    [ ${#ahead[@]} -eq 0 ] && return
    [ -d "$DATA" ] || [ -n "$PATHS$DRY_RUN" ] ||
        refuse "DATA=$DATA is not a folder; name the folder that holds the data sets"
    run "$PYTHON" -m mdil check --domains "${ahead[@]}" --pairs-only "${data[@]}"
}

# Evaluates checkpoints in step order, unless JSON has their results: evaluate_states JSON STATE...
evaluate_states() {
    local json=$1
    shift
    [ "$NODE" -eq 0 ] && [ "$EVALUATE" != none ] || return 0
    run "$PYTHON" eval.py --state "$@" "${data[@]}" --height "$HEIGHT" --width "$WIDTH" \
        --num-workers "$WORKERS" --json "$json" --resume --per-class ${metric[@]+"${metric[@]}"}
}
