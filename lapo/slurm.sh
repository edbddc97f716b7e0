#!/usr/bin/env bash
# A grid of runs on a Slurm cluster, one array task per game and seed; see docs/cluster.md:
#
#   bash slurm.sh --partition=gpu --gpus=1 --time=8:00:00 -- bigfish maze --seeds 0,1,2 --exp first
#
# Before the -- stand options of sbatch, behind it the arguments of launch.sh, which are checked before anything
# is submitted. A task whose job is preempted goes back into the queue and continues there, and so does one
# whose time is up: two minutes before its limit it saves and puts itself back. A task that fails stays failed;
# the same command again submits all tasks, of which the finished ones return at once.

set -euo pipefail
source=${BASH_SOURCE[0]}
[[ ! -L $source ]] || source=$(readlink -f "$source") # the folder of this file, not of a link to it
here=$(cd "$(dirname "$source")" && pwd)

die() {
    echo "error: $1" >&2
    exit 2
}

# Of a script that it is given, sbatch runs a copy elsewhere.
[[ -f $here/launch.sh ]] || die "$here/${0##*/} is a copy of slurm.sh without the repository; start it with bash, it calls sbatch itself: bash slurm.sh --gpus=1 -- bigfish"

# ---- at the user's prompt: submit

if [[ -z ${SLURM_ARRAY_TASK_ID-} ]]; then
    options=()
    while (($#)) && [[ $1 != -- ]]; do
        if [[ $1 == -h || $1 == --help ]]; then
            sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit
        fi
        options+=("$1")
        shift
    done
    (($#)) || die "a -- must part sbatch's options from the runs, as in: bash slurm.sh --gpus=1 -- bigfish --seeds 0,1"
    shift
    command -v sbatch >/dev/null || die "there is no sbatch here; submit from a machine of the cluster, or use launch.sh"
    runs=$(bash "$here/launch.sh" "$@" --list) || exit 2
    nl -v 0 <<<"$runs"
    # Slurm runs a copy of the script it is given, which could not find its neighbours: so a script that calls this file.
    exec sbatch --job-name=lapo --array="0-$(($(wc -l <<<"$runs") - 1))" --requeue --open-mode=append \
        --signal=B:USR1@120 ${options[@]+"${options[@]}"} <<EOF
#!/usr/bin/env bash
exec bash $(printf '%q ' "$here/slurm.sh" "$@")
EOF
fi

# ---- in the job: run one of them

# The processors of this job, not all that the machine has.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_ON_NODE:-1}}

bash "$here/launch.sh" "$@" --task "$SLURM_ARRAY_TASK_ID" &
launched=$! told="" time_is_up=""
stop() {
    told=yes
    kill -TERM "$launched" 2>/dev/null || true
}
trap stop TERM
trap 'time_is_up=yes; stop' USR1

# A signal ends `wait` early.
while told=""; do
    code=0
    wait "$launched" || code=$?
    [[ -n $told ]] || break
done

if [[ -n $time_is_up ]] && ((code == 143)); then
    ((SECONDS > 60)) || die "a time limit this short leaves no time to train; choose a longer --time"
    echo "slurm.sh: the time is up, so this task goes back into the queue" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
