# Sourced by the other scripts: makes .venv with the pinned requirements if it is missing or was made
# of others; sets ROOT and PYTHON. REQUIREMENTS=requirements.lock takes the exact versions that were
# tested, instead of the newest that requirements.txt allows. KEEP_ENVIRONMENT=1 (jobs: they run side
# by side) installs nothing. Configs, data and runs are looked up where the caller stands.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$ROOT/.venv}
complete="$VENV/.complete" # what the environment was made of
requirements=$ROOT/${REQUIREMENTS:-requirements.txt}  # REQUIREMENTS goes on to scripts called from here
tools=('pytest>=9,<10' 'pytest-xdist>=3.8,<4' 'ruff>=0.17,<0.18')
wanted=$(grep -Ev '^ *(#.*)?$' "$requirements" && printf '%s\n' "${tools[@]}")
if [ ! -f "$complete" ] || [ "$(cat "$complete")" != "$wanted" ]; then
  if [ -z "${KEEP_ENVIRONMENT:-}" ]; then
    mkdir -p "$VENV"
    exec 9>"$VENV/.lock"
    ! command -v flock >/dev/null || flock 9  # of two callers one makes it
    if [ ! -f "$complete" ] || [ "$(cat "$complete")" != "$wanted" ]; then
      echo "making $VENV (a few minutes, about 2 GB)" >&2
      rm -f "$complete"
      "${PYTHON:-python3}" -m venv "$VENV"
      "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements" \
        "${tools[@]}"
      printf '%s\n' "$wanted" >"$complete"
    fi
    exec 9>&-
  elif [ -f "$complete" ]; then
    echo "$VENV was made of other requirements; it is used as it is" >&2
  else
    echo "there is no environment in $VENV: bash scripts/setup_node.sh makes it" >&2
    exit 1
  fi
fi
PYTHON=$(realpath -s "$VENV/bin/python")
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=false
# Spinning OpenMP threads stall one another on a busy machine; large blocks that go back to the
# system at every free cost page faults (a third of a small model's training step). No result
# depends on either.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=2000000000
export MALLOC_TOP_PAD_=134217728
