"""Quality of a codec, measured through the real cache."""

from kvfold.evaluate.evaluate import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
