"""How well tasks on a running server write, by the field's metrics.

Needs `pip install 'prefixserve[eval]'`.
"""

from clients.evaluation.evaluation import Evaluation, TaskResult, evaluate, score_outputs
from clients.evaluation.generation import Output, generate_outputs
from clients.evaluation.metrics import Metric, MetricDataError, metric_names
from clients.evaluation.report import write_report
from clients.evaluation.scores import Difference, Measurement, Score, differences, measure, scores

__all__ = [
    "Difference",
    "Evaluation",
    "Measurement",
    "Metric",
    "MetricDataError",
    "Output",
    "Score",
    "TaskResult",
    "differences",
    "evaluate",
    "generate_outputs",
    "measure",
    "metric_names",
    "score_outputs",
    "scores",
    "write_report",
]
