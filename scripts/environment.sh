# Sourced by the other scripts: makes .venv with the pinned requirements if it is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv}
if [ ! -f "$VENV/.complete" ] || [ requirements.txt -nt "$VENV/.complete" ]; then
  echo "making $VENV (a few minutes, about 2 GB)"
  "${PYTHON:-python3}" -m venv "$VENV"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt \
    'pytest>=9,<10' 'ruff>=0.17,<0.18'
  touch "$VENV/.complete"
fi
PYTHON="$VENV/bin/python"
