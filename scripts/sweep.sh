#!/usr/bin/env bash
# Submit several experiments to Slurm (or run them here), and one report over all of them.
# Data and router of each wait for those of the one before: what they share is made once.
# usage: bash scripts/sweep.sh [--dry-run] [--local] [--output FOLDER] CONFIG ... [key=value ...]
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
source "${SITE:-$ROOT/scripts/site.sh}"
source "$ROOT/scripts/hide_secrets.sh"
flags=() local= output=runs/report configs=() overrides=()
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) flags+=(--dry-run) ;;
    --local) local=1 ;;
    --output) output=$2 && shift ;;
    -*) echo "sweep.sh: $1: unknown option" >&2 && exit 2 ;;
    *) if [ -f "$1" ] || [[ $1 != *=* ]]; then configs+=("$1"); else overrides+=("$1"); fi ;;
  esac
  shift
done
[ ${#configs[@]} -gt 0 ] || { sed -n '2,4s/^# //p' "$ROOT/scripts/sweep.sh" >&2; exit 2; }
here() { # run a command; a signal is for it, which saves what it has
  [ -z "$asked" ] || exit 143
  "$@" &
  child=$!
  [ -z "$asked" ] || kill -TERM $child # before it was there
  while kill -0 $child 2>/dev/null; do wait $child || true; done
  wait $child || exit $?
}
asked= child= runs=() reports= before=
trap 'asked=1; kill -TERM $child 2>/dev/null || true' TERM HUP INT
for config in "${configs[@]}"; do
  echo "== $config"
  if [ -n "$local" ]; then
    here bash "$ROOT/scripts/run_local.sh" "${flags[@]}" "$config" "${overrides[@]}"
  else
    submitted=$(bash "$ROOT/scripts/slurm.sh" "${flags[@]}" ${before:+--after "$before"} \
      "$config" "${overrides[@]}")
    echo "$submitted"
    before=$(awk '$1 == "router" { print $2 }' <<<"$submitted")
    reports+=:$(awk '$1 == "report" { print $2 }' <<<"$submitted")
  fi
  runs+=("$("$PYTHON" -m tiered.plan --folder "$config" "${overrides[@]}")")
done
report=("$PYTHON" -m tiered.report "${runs[@]}" --output "$output")
if [ ${#flags[@]} -gt 0 ]; then
  echo "then: ${report[*]}"
elif [ -n "$local" ]; then
  here "${report[@]}"
else
  sbatch --parsable --job-name=report --dependency="afterok$reports" --kill-on-invalid-dep=yes \
    "${SITE_ALL[@]}" "${SITE_CPU[@]}" --output="$output.log" --wrap "$(printf '%q ' "${report[@]}")"
fi
