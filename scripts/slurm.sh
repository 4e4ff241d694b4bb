#!/usr/bin/env bash
# Submit one experiment to Slurm: dependent jobs from raw text to report, arrays over source files,
# domains, partitions and forget sets. What is done already is skipped by the jobs themselves: after
# a failure, submit again.
# usage: bash scripts/slurm.sh [--dry-run] [--after JOBID[:JOBID]] CONFIG [key=value ...]
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
source "${SITE:-$ROOT/scripts/site.sh}"
source "$ROOT/scripts/hide_secrets.sh"
dry= after=
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry=1 && shift ;;
    --after) after=$2 && shift 2 ;;
    *) break ;;
  esac
done
[ $# -gt 0 ] || { sed -n '2,5s/^# //p' "$ROOT/scripts/slurm.sh" >&2; exit 2; }
if [ -z "$dry" ] && ! command -v sbatch >/dev/null; then
  echo "slurm.sh: there is no sbatch on this machine; scripts/run_local.sh runs an experiment here" >&2
  exit 2
fi
site=(--reading-tasks "$SITE_READING_TASKS" --gpus "$SITE_GPUS")
if [ -n "$dry" ]; then
  plan=$(mktemp)
  trap 'rm -f "$plan"' EXIT
  "$PYTHON" -m tiered.plan "$@" "${site[@]}" --write "$plan" >/dev/null
  name=$(basename "${1%.*}")
else
  plan=$("$PYTHON" -m tiered.plan "$@" "${site[@]}" --write)
  name=$(basename "$(dirname "$(dirname "$plan")")")
fi

submit() { # prints a job id
  if [ -n "$dry" ]; then
    echo "sbatch $*" >&2
    echo "<$job>"
  else
    sbatch --parsable "$@" | sed 's/;.*//'  # of several clusters: id;cluster
  fi
}

declare -A ids
while IFS=$'\t' read -r job kind several before count; do
  options=(--job-name="$name-$job" "${SITE_ALL[@]}" --signal="B:USR1@$SITE_GRACE")
  limit=$SITE_CPU_LIMIT
  if [ "$kind" = cpu ]; then
    options+=("${SITE_CPU[@]}")
  else
    limit=$SITE_GPU_LIMIT
    if [ "$several" = several ] && [ "$SITE_GPUS" -gt 1 ]; then
      options+=("${SITE_SEVERAL[@]}")
    else
      options+=("${SITE_GPU[@]}")
    fi
  fi
  log=$(dirname "$plan")/$job
  if [ "$count" -gt 1 ]; then
    options+=(--array="0-$((count - 1))%$limit" --output="$log-%a.log")
  else
    options+=(--output="$log-0.log")
  fi
  if [ "$before" != - ]; then
    options+=(--dependency=afterok"$(for b in ${before//,/ }; do printf ':%s' "${ids[$b]}"; done)")
    options+=(--kill-on-invalid-dep=yes)
  elif [ -n "$after" ]; then # another experiment may make what this one shares: after its end
    options+=(--dependency="afterany:$after")
  fi
  ids[$job]=$(submit "${options[@]}" "$ROOT/scripts/job.sbatch" "$ROOT" "$plan" "$job")
  echo "$job ${ids[$job]}"
done < <(awk -F'\t' '{ if (!n[$1]++) order[++m] = $1; kind[$1] = $2; several[$1] = $3
                        before[$1] = $4 == "" ? "-" : $4 }
                END { for (i = 1; i <= m; i++) { j = order[i]
                        print j "\t" kind[j] "\t" several[j] "\t" before[j] "\t" n[j] } }' "$plan")
