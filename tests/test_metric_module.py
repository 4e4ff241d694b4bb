"""The local `evaluate` metric: loads offline and counts as by hand."""

from pathlib import Path

import evaluate

FOLDER = Path(__file__).resolve().parents[1] / "tiered/metric_modules/next_token_accuracy"


def test_next_token_accuracy_by_hand():
    metric = evaluate.load(str(FOLDER))
    # row 1 predicts 5 6 (7): labels 4 [5 6] -> 2 of 2; row 2: -100 is left out, 1 of 1 wrong
    result = metric.compute(
        predictions=[[5, 6, 7], [8, 9, 1]], references=[[4, 5, 6], [3, -100, 2]]
    )
    assert result == {"accuracy": 2 / 3, "tokens": 3}
