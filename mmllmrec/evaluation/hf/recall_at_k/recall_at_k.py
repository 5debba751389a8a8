"""Recall@k as a module of Hugging Face ``evaluate``; load it with ``evaluate.load(str(hf.path("recall_at_k")))``."""

# evaluate reads a module's imports line by line, offline too: each keeps a line of its own, at the margin
import evaluate

from mmllmrec.evaluation.hf import info, mean

DESCRIPTION = "Share of each user's positives among the first k predicted items, mean over users."
INPUTS = """
Args:
    predictions: ranked item ids of each user, best first, all strings or all integers.
    references: ids of each user's positives, of the same kind; none may be empty.
    k: how many places count (default 20).
Returns:
    {"recall@<k>": float}, |positives in the first k| / |positives|.
Raises:
    ValueError naming the row, for one without references and for an id twice in a row.
"""


class RecallAtK(evaluate.Metric):
    """``compute(predictions=, references=, k=20)`` -> {"recall@20": float}."""

    def _info(self) -> evaluate.MetricInfo:
        return info(description=DESCRIPTION, inputs=INPUTS)

    def _compute(self, predictions: list[list], references: list[list], k: int = 20) -> dict[str, float]:
        return mean(f"recall@{k}", predictions, references=references)
