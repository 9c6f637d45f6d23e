"""Quality of a codec, measured through the real cache."""

from kvfold.evaluate.evaluate import Evaluation, evaluate
from kvfold.evaluate.needle import NeedleResult, needle
from kvfold.evaluate.tasks import TaskResults, evaluate_tasks, load_tasks

__all__ = ["Evaluation", "NeedleResult", "TaskResults", "evaluate", "evaluate_tasks", "load_tasks", "needle"]
