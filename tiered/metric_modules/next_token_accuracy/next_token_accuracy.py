"""Top-1 next-token accuracy as an `evaluate` metric that loads without the hub.

evaluate.load("tiered/metric_modules/next_token_accuracy")
"""

import datasets
import evaluate
import numpy as np


class NextTokenAccuracy(evaluate.Metric):
    """Share in [0, 1] of scored positions whose argmax is the next token.

    predictions: (R, T) argmax ids, position t predicting token t + 1; references: (R, T) label
    ids, where -100 is not scored. Position 0 of the references has no prediction.
    """

    def _info(self) -> evaluate.MetricInfo:
        row = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description="Top-1 next-token accuracy; position 0 and labels of -100 are left out.",
            citation="",
            inputs_description="predictions and references: lists of rows of token ids",
            features=datasets.Features({"predictions": row, "references": row}),
        )

    def _compute(self, predictions: list[list[int]], references: list[list[int]]) -> dict:
        hits = scored = 0
        for predicted, labels in zip(predictions, references, strict=True):
            target = np.asarray(labels)[1:]
            valid = target != -100
            hits += int((np.asarray(predicted)[:-1][valid] == target[valid]).sum())
            scored += int(valid.sum())
        return {"accuracy": hits / scored if scored else float("nan"), "tokens": scored}
