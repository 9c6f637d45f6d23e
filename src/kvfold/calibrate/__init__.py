"""Calibration: one pass over text, then one fit a layer and side."""

from kvfold.calibrate.calibrate import calibrate

__all__ = ["calibrate"]
