#!/usr/bin/env bash
# Run the three stages, one game after the other:
#
#   bash launch.sh                            all 16 games
#   bash launch.sh bigfish maze --seed 1      these games; other arguments go to every stage script
#   bash launch.sh bigfish --seeds 0,1,2      each game once with each of these seeds
#   bash launch.sh maze --modes online,bc     stage 3 once in each of these modes, not in the config's
#   bash launch.sh mygame --stages 1,2        only these stages
#   bash launch.sh maze --data record         first record an expert, if there are no frames (or: published, huggingface)
#   bash launch.sh maze --sweep stage1.lr=1e-4,3e-4   each value as an exp of its own: main-stage1.lr=1e-4, …
#                                             (several --sweep: all combinations)
#   bash launch.sh maze --seeds 0,1 --jobs 2  two runs at a time, with one thread each
#   bash launch.sh maze ninja --gpus 0,1      a run at a time on each of these GPUs
#   bash launch.sh maze --seeds 0,1 --list    check everything, print the runs with hours and gigabytes, start none
#   bash launch.sh maze --seeds 0,1 --task 1  only this one of them, counted from 0, as slurm.sh does
#
# A game is one of Procgen's, an environment of your own as module:function, or any name with a folder of
# frames in the config's data_dir (which the modes of stage 3 that play cannot use). Names and arguments are
# checked before anything starts. A run that fails is reported, its later stages are skipped and the other
# runs go on. A stage that has finished returns at once and a stopped one resumes, so the same command
# continues where it was.
# With --jobs and --gpus, a run's output goes to launch.log in its folder; a line tells when it starts and ends.
# Exit status: 0 all runs finished, 1 some failed, 2 a mistake on the command line.
# PYTHON=... names the interpreter; otherwise it is the repository's .venv, or python3 where there is none.

set -euo pipefail
source=${BASH_SOURCE[0]}
[[ ! -L $source ]] || source=$(readlink -f "$source") # the folder of this file, not of a link to it
here=$(cd "$(dirname "$source")" && pwd)
unset PYTHONSAFEPATH # with it, Python does not look for modules beside a script

die() {
    echo "error: $1" >&2
    exit 2
}

# Of a script that it is given, sbatch runs a copy elsewhere.
[[ -f $here/config.yaml ]] || die "$here/${0##*/} is a copy of launch.sh without the repository; on a cluster, start slurm.sh: bash slurm.sh --gpus=1 -- bigfish"

original=("$@")
games=() seeds="" stages=1,2,3 modes="" data="" list="" task="" sweeps="" jobs="" gpus="" passed=()
while (($#)); do
    case $1 in
        -h | --help)
            sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            echo "The options of the stages: python $here/stage1.py --help"
            exit
            ;;
        --env | --env=*) die "games are named first and without --env, as in: bash launch.sh bigfish maze" ;;
        --seeds=* | --stages=* | --modes=* | --data=* | --task=* | --sweep=* | --jobs=* | --gpus=*)
            set -- "${1%%=*}" "${1#*=}" "${@:2}"
            continue
            ;;
        --stages | --modes)
            [[ -n ${2-} ]] || die "$1 needs a list, as in: --stages 1,2 or --modes online,offline"
            if [[ $1 == --stages ]]; then stages=$2; else modes=$2; fi
            shift
            ;;
        --seeds)
            [[ ${2-} =~ ^[0-9]+(,[0-9]+)*$ ]] || die "--seeds is '${2-}', but must list some, as in: --seeds 0,1,2"
            seeds=$2
            shift
            ;;
        --data)
            [[ ${2-} =~ ^(record|published|huggingface)$ ]] || die "--data is '${2-}', but must be record (an expert plays), published or huggingface (downloads)"
            data=$2
            shift
            ;;
        --task)
            [[ ${2-} =~ ^[0-9]{1,9}$ ]] || die "--task is '${2-}', but must be the number of a run, counted from 0"
            task=$((10#$2))
            shift
            ;;
        --sweep)
            [[ ${2-} =~ ^[^[:space:]]+$ ]] || die "--sweep is '${2-}', but must be a key and values, as in: --sweep stage1.lr=1e-4,3e-4"
            sweeps+=" $2"
            shift
            ;;
        --jobs)
            [[ ${2-} =~ ^[1-9][0-9]{0,3}$ ]] || die "--jobs is '${2-}', but must be how many runs go on at a time"
            jobs=$2
            shift
            ;;
        --gpus)
            [[ ${2-} =~ ^[0-9]+(,[0-9]+)*$ ]] || die "--gpus is '${2-}', but must list numbers of GPUs, as in: --gpus 0,1,2,3"
            gpus=$2
            shift
            ;;
        --list) list=yes ;;
        --mode | --stage | --job | --gpu | --mode=* | --stage=* | --job=* | --gpu=*)
            die "unknown option ${1%%=*}; did you mean ${1%%=*}s?"
            ;;
        --sweeps | --tasks | --sweeps=* | --tasks=*)
            word=${1%%=*}
            die "unknown option $word; did you mean ${word%s}?"
            ;;
        -*) passed+=("$1") ;;
        *) if ((${#passed[@]})); then passed+=("$1"); else games+=("$1"); fi ;;
    esac
    shift
done
[[ -z $jobs || -z $gpus ]] || die "--jobs and --gpus: give one of the two"
[[ $stages =~ ^[123](,[123])*$ ]] || die "--stages is '$stages', but must list some of 1,2,3"
for word in ${passed[@]+"${passed[@]}"}; do # the last of the two would count
    case $word in
        --seed | --seed=*) [[ -z $seeds ]] || die "--seed and --seeds: give one of the two" ;;
        --stage3.mode | --stage3.mode=*) [[ -z $modes ]] || die "--stage3.mode and --modes: give one of the two" ;;
    esac
done
set -- ${passed[@]+"${passed[@]}"} # what the stages get; old versions of bash call an empty array unbound

python=$here/../.venv/bin/python
[[ -x $python ]] || python=python3
python=${PYTHON:-$python}
command -v "$python" >/dev/null || die "there is no interpreter $python; run 'make venv', or set PYTHON"

# The whole command line is checked by the code that the stages use. It prints the runs, one per line, and before
# them, a $ and the commands that get missing frames: see grid.py.
selected=$(
    "$python" - "$here" "${games[*]-}" "${seeds//,/ }" "${modes//,/ }" "$stages" "$data" "$list" "$sweeps" "$@" <<'EOF'
import os
import sys

here, *words = sys.argv[1:]
sys.argv[0] = "stage1.py"
sys.path.insert(0, os.path.dirname(here))
try:
    from lapo.errors import run_main
    from lapo.grid import plan
except ModuleNotFoundError as error:
    sys.exit(f"error: {sys.executable} has no module '{error.name}'; run 'make venv', or set PYTHON")
run_main(lambda: plan(*words))
EOF
) || exit 2
runs=() missing=()
while read -r run; do
    if [[ $run == '$ '* ]]; then missing+=("${run#* }"); else runs+=("$run"); fi
done <<<"$selected"
if [[ -n $task ]]; then
    ((task < ${#runs[@]})) || die "--task is $task, but there are ${#runs[@]} runs, counted from 0"
    runs=("${runs[task]}") jobs="" gpus=""
    IFS=$'\t' read -r _ _ game _ <<<"${runs[0]}"
    for get in ${missing[@]+"${missing[@]}"}; do # several tasks would get them at once
        [[ ${get%% *} != "$game" || -n $list ]] || die "$game has no frames yet, or not all; get them before its tasks run: $python $here/${get#* }"
    done
fi
if [[ -n $list ]]; then
    printf '%s\n' "${runs[@]}"
    exit
fi

# Every step of a run: number of the stage, its script and, for stage 3, perhaps a mode.
steps=()
for stage in ${stages//,/ }; do
    case $stage in
        1) steps+=("1 stage1_idm_wm.py") ;;
        2) steps+=("2 stage2_bc.py") ;;
        3)
            [[ -n $modes ]] || steps+=("3 stage3_decode.py")
            for mode in ${modes//,/ }; do steps+=("3 stage3_decode.py $mode"); done
            ;;
    esac
done

# A stage runs in the background because bash would handle a signal only after a foreground command has
# ended. Bash also makes background commands ignore Ctrl-C, so the stage is told to stop by SIGTERM.
stop() {
    # A scheduler tells all processes of a job, and perhaps again: while the stage saves, that changes nothing.
    trap '' TERM HUP USR1
    trap - INT
    local running
    running=$(jobs -pr)
    if [[ -n $running ]]; then
        kill -TERM "$running" 2>/dev/null || true
        wait "$running" || true
    fi
    echo "launch.sh: stopped by SIG$1; the same command continues" >&2
    exit "$2"
}
trap 'stop INT 130' INT
trap 'stop TERM 143' TERM
trap 'stop HUP 129' HUP
trap 'stop USR1 138' USR1

# Get the frames of a game, if they are missing; sets `outcome` if that fails.
got=""
get_frames() {
    local get code
    for get in ${missing[@]+"${missing[@]}"}; do
        [[ ${get%% *} == "$1" && $outcome == finished && $got != *"<$get>"* ]] || continue
        echo "launch.sh: $1, frames"
        code=0
        eval "exec \"\$python\" \"\$here\"/${get#* }" &
        wait $! || code=$?
        if ((code)); then outcome="failed to get frames, exit code $code"; else got+="<$get>"; fi
    done
}

summary="" failed=0
if [[ -n $jobs$gpus ]]; then # a queue of runs, each of them this command with --task
    queue="" looked=" "
    for number in "${!runs[@]}"; do
        IFS=$'\t' read -r name log game _ <<<"${runs[number]}"
        queue+="${queue:+$'\n'}$number"$'\t'"$name"$'\t'"$log"
        [[ $looked != *" $game "* ]] || continue
        looked+="$game " outcome=finished
        get_frames "$game" # where this fails, the game's runs try again and report it
    done
    slots=${gpus:-$(seq -s , "$jobs")}
    exec "$python" "$here/grid.py" --slots "$slots" ${gpus:+--gpus} bash "$here/launch.sh" "${original[@]}" <<<"$queue"
fi
for run in "${runs[@]}"; do
    IFS=$'\t' read -r name _ game seed options <<<"$run"
    [[ $seed != - ]] || seed=""
    began=$SECONDS outcome=finished
    get_frames "$game"
    for step in "${steps[@]}"; do
        [[ $outcome == finished ]] || break
        read -r stage script mode <<<"$step"
        echo "launch.sh: $name, stage $stage${mode:+ ($mode)}"
        code=0
        # shellcheck disable=SC2086 # the options of a sweep are words without special characters
        "$python" "$here/$script" --env "$game" ${seed:+--seed "$seed"} "$@" $options ${mode:+--stage3.mode "$mode"} &
        wait $! || code=$?
        ((!code)) || outcome="failed in stage $stage${mode:+ ($mode)}, exit code $code"
    done
    if [[ $outcome != finished ]]; then
        failed=1
        echo "launch.sh: $name $outcome" >&2
    fi
    summary+=$(printf '  %-10s %s (%d min)' "$name" "$outcome" $(((SECONDS - began) / 60)))$'\n'
done
printf 'launch.sh: summary\n%s' "$summary"
exit $failed
