#!/usr/bin/env bash
# Download and unpack the published expert data into expert_data/:
#     bash setup_data.sh bigfish maze
#     bash setup_data.sh all
# Several gigabytes per game. `bash setup_data.sh --help` shows the options.
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
python=${PYTHON:-$here/.venv/bin/python}
if ! command -v "$python" >/dev/null; then
    echo "error: there is no $python; run 'make venv' in $here first" >&2
    exit 2
fi
exec "$python" "$here/lapo/download_data.py" "$@"
