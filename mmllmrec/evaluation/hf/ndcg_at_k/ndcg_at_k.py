"""NDCG@k as a module of Hugging Face ``evaluate``; load it with ``evaluate.load(str(hf.path("ndcg_at_k")))``."""

# evaluate reads a module's imports line by line, offline too: each keeps a line of its own, at the margin
import evaluate

from mmllmrec.evaluation.hf import info, mean

DESCRIPTION = "Discounted cumulative gain of the first k predicted items over the ideal one, mean over users."
INPUTS = """
Args:
    predictions: ranked item ids of each user, best first, all strings or all integers.
    references: ids of each user's positives, of the same kind; none may be empty.
    k: how many places count (default 20).
Returns:
    {"ndcg@<k>": float}, sum of 1 / log2(place + 1) over the hits in the first k, divided by that of
    min(|positives|, k) hits at the top.
Raises:
    ValueError naming the row, for one without references and for an id twice in a row.
"""


class NDCGAtK(evaluate.Metric):
    """``compute(predictions=, references=, k=20)`` -> {"ndcg@20": float}."""

    def _info(self) -> evaluate.MetricInfo:
        return info(description=DESCRIPTION, inputs=INPUTS)

    def _compute(self, predictions: list[list], references: list[list], k: int = 20) -> dict[str, float]:
        return mean(f"ndcg@{k}", predictions, references=references)
