#!/usr/bin/env bash
# Run one experiment on this machine, from raw text to report: all cores, or all GPUs, a partition
# per worker. What it makes is what scripts/slurm.sh makes, byte for byte.
# usage: bash scripts/run_local.sh [--dry-run] [--workers N] CONFIG [key=value ...]
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m tiered.local_run "$@"
