"""The scores of common/metrics.py as a Hugging Face metric, offline. By itself: the library takes
seconds to import.

metric = evaluate.load("<repository>/common/guard_metrics.py")
metric.compute(predictions=[0.9, 0.2], references=[1, 0])
"""

import datasets
import evaluate

from common.metrics import binary


class GuardMetrics(evaluate.Metric):
    """`binary` as a Hugging Face metric: predictions are probabilities, references 0 or 1."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Scores of a guard: probabilities of the unsafe class against 0/1 truths.",
            citation="",
            inputs_description="predictions: probabilities in [0, 1]; references: 1 unsafe, 0 safe; threshold: 0.5",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int32")}
            ),
        )

    def _compute(self, predictions, references, threshold=0.5):
        return binary(references, predictions, threshold)
