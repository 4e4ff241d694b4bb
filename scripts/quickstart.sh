#!/usr/bin/env bash
# From raw text to the unlearning report on the bundled sample corpus, n = 1, 4, 16.
# usage: bash scripts/quickstart.sh            (no network needed after installation)
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$ROOT"
configs=(configs/quickstart/n01.yaml configs/quickstart/n04.yaml configs/quickstart/n16.yaml)
begin=$SECONDS
for stage in process_dset train_det_router run_clm eval_det_router unlearn_benchmarks; do
  echo "== $stage"
  start=$SECONDS
  "$PYTHON" "$stage.py" "${configs[@]}" "$@"
  echo "== $stage: $((SECONDS - start)) s"
done
"$PYTHON" -m tiered.report runs/quickstart-n01 runs/quickstart-n04 runs/quickstart-n16 \
  --output runs/report
echo "pipeline: $((SECONDS - begin)) s"
