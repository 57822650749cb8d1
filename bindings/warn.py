"""Warnings that point at the user's line: torch wraps ``Optimizer.step``, and a Trainer or a loop may call it."""

import sys
import warnings

_PASSED_BY = {"zo_core", "torch", "transformers", "accelerate", "trl", "lightning", "pytorch_lightning"}


def warn(text: str) -> None:
    """A UserWarning at the innermost line that calls this library from outside it, torch and the training loops."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED_BY:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)
