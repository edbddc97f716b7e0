#!/usr/bin/env bash
# Run the three stages, one game after the other:
#
#   bash launch.sh                            all 16 games
#   bash launch.sh bigfish maze --seed 1      these games; other arguments go to every stage script
#   bash launch.sh maze --modes online,bc     stage 3 once in each of these modes, not in the config's
#   bash launch.sh mygame --stages 1,2        only these stages
#
# A game is one of Procgen's, or any name with a folder of frames in the config's data_dir (stage 3 plays,
# so it needs Procgen). Names and arguments are checked before anything starts. A game that fails is
# reported, its later stages are skipped and the other games go on. A stage that has finished returns at
# once and a stopped one resumes, so the same command continues where it was.
# Exit status: 0 all games finished, 1 some failed, 2 a mistake on the command line.
# PYTHON=... names the interpreter; otherwise it is the repository's .venv, or python3 where there is none.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

die() {
    echo "error: $1" >&2
    exit 2
}

games=() stages=1,2,3 modes="" passed=()
while (($#)); do
    case $1 in
        -h | --help)
            sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            echo "The options of the stages: python $here/stage1.py --help"
            exit
            ;;
        --env | --env=*) die "games are named first and without --env, as in: bash launch.sh bigfish maze" ;;
        --stages=* | --modes=*)
            set -- "${1%%=*}" "${1#*=}" "${@:2}"
            continue
            ;;
        --stages | --modes)
            [[ -n ${2-} ]] || die "$1 needs a list, as in: --stages 1,2 or --modes online,offline"
            if [[ $1 == --stages ]]; then stages=$2; else modes=$2; fi
            shift
            ;;
        -*) passed+=("$1") ;;
        *) if ((${#passed[@]})); then passed+=("$1"); else games+=("$1"); fi ;;
    esac
    shift
done
[[ $stages =~ ^[123](,[123])*$ ]] || die "--stages is '$stages', but must list some of 1,2,3"
set -- ${passed[@]+"${passed[@]}"} # what the stages get; old versions of bash call an empty array unbound

python=$here/../.venv/bin/python
[[ -x $python ]] || python=python3
python=${PYTHON:-$python}
command -v "$python" >/dev/null || die "there is no interpreter $python; run 'make venv', or set PYTHON"

# The whole command line is checked by the code that the stages use; it prints the games to run.
selected=$(
    "$python" - "$here" "${games[*]-}" "${modes//,/ }" "$@" <<'EOF'
import sys

here, games, modes, *arguments = sys.argv[1:]
sys.argv[0] = "stage1.py"
sys.path[0] = here
try:
    from config import load_config
    from errors import run_main
    from procgen_env import GAMES, check_data
except ModuleNotFoundError as error:
    sys.exit(f"error: {sys.executable} has no module '{error.name}'; run 'make venv', or set PYTHON")


def main() -> None:
    for extra in [[], *(["--stage3.mode", mode] for mode in modes.split())]:
        load_config([*arguments, *extra])
    for game in games.split():
        check_data(game, load_config([*arguments, "--env", game]).game_data)
    print(*(games.split() or GAMES))


run_main(main)
EOF
) || exit 2

# Every step of a game: number of the stage, its script and, for stage 3, perhaps a mode.
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
    trap - INT TERM HUP
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

summary="" failed=0
for game in $selected; do
    began=$SECONDS outcome=finished
    for step in "${steps[@]}"; do
        read -r stage script mode <<<"$step"
        echo "launch.sh: $game, stage $stage${mode:+ ($mode)}"
        code=0
        "$python" "$here/$script" --env "$game" "$@" ${mode:+--stage3.mode "$mode"} &
        wait $! || code=$?
        if ((code)); then
            outcome="failed in stage $stage${mode:+ ($mode)}, exit code $code"
            failed=1
            echo "launch.sh: $game $outcome" >&2
            break
        fi
    done
    summary+=$(printf '  %-10s %s (%d min)' "$game" "$outcome" $(((SECONDS - began) / 60)))$'\n'
done
printf 'launch.sh: summary\n%s' "$summary"
exit $failed
