"""Measuring: cost, quality and evidence. The room is also the verb `opsin.measure(model, 224)`."""

from opsin._verbs import make_callable
from opsin.measure.duration import parse_duration

__all__ = ["parse_duration"]

make_callable(__name__)
