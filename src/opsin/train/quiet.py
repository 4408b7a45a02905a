"""Keeps Lightning's advice out of the way of the user's own output."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LOGGERS = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")


def silence() -> None:
    """No hints on workers, accelerators or checkpoints from here on. Errors still come through."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning(\.|$)")
    warnings.filterwarnings("ignore", module=r"torch\.distributed")


@contextmanager
def quiet() -> Iterator[None]:
    """`silence` for the time of a `with` block."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    try:
        with warnings.catch_warnings():
            silence()
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
