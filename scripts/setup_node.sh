#!/usr/bin/env bash
# A fresh machine: the environment, and what torch and the project find there.
# usage: bash scripts/setup_node.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$ROOT"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv 2>/dev/null ||
  echo "no NVIDIA driver answers: models are computed on the CPU"
"$PYTHON" - <<'P'
import os
import torch
print(f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}, {os.cpu_count()} cores")
for i in range(torch.cuda.device_count()):
    found = torch.cuda.get_device_properties(i)
    print(f"GPU {i}: {found.name}, {found.total_memory / 2**30:.0f} GiB")
x = torch.randn(64, 64, device="cuda" if torch.cuda.is_available() else "cpu")
print(f"a product on {x.device}: finite {bool((x @ x).isfinite().all())}")
P
if command -v nvidia-smi >/dev/null && ! "$PYTHON" -c 'import torch; torch.cuda.init()' 2>/dev/null
then
  echo "there is a GPU that torch cannot use: pip took a build for the CPU, or the driver is older" \
    "than this build's CUDA" >&2
  exit 1
fi
