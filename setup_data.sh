#!/usr/bin/env bash
# Download and unpack the published expert data into expert_data/:
#     bash setup_data.sh bigfish maze
#     bash setup_data.sh all
# Frames of other experts, from the Hugging Face hub, if the archives cannot be had:
#     bash setup_data.sh --source huggingface bigfish maze --frames 2621440 --test-frames 65536
# Several gigabytes per game. `bash setup_data.sh --help` shows the options.
set -euo pipefail
source=${BASH_SOURCE[0]}
[[ ! -L $source ]] || source=$(readlink -f "$source") # the folder of this file, not of a link to it
here=$(cd "$(dirname "$source")" && pwd)
unset PYTHONSAFEPATH # with it, Python does not look for modules beside a script
python=${PYTHON:-$here/.venv/bin/python}
if ! command -v "$python" >/dev/null; then
    echo "error: there is no $python; run 'make venv' in $here first" >&2
    exit 2
fi
exec "$python" "$here/lapo/download_data.py" "$@"
