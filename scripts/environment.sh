# Sourced by the other scripts: makes .venv with the pinned requirements if it is missing; sets ROOT
# and PYTHON. REQUIREMENTS=requirements.lock takes the exact versions that were tested, instead of the
# newest that requirements.txt allows. Configs, data and runs are looked up where the caller stands.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$ROOT/.venv}
complete="$VENV/.complete"
requirements=$ROOT/${REQUIREMENTS:-requirements.txt}  # REQUIREMENTS goes on to scripts called from here
if [ ! -f "$complete" ] || [ "$requirements" -nt "$complete" ] ||
  [ "$ROOT/scripts/environment.sh" -nt "$complete" ]; then
  echo "making $VENV (a few minutes, about 2 GB)" >&2
  "${PYTHON:-python3}" -m venv "$VENV"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
    -r "$requirements" 'pytest>=9,<10' 'pytest-xdist>=3.8,<4' 'ruff>=0.17,<0.18'
  touch "$complete"
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
