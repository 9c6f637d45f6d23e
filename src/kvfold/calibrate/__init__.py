"""Calibration: one pass over text, then one fit a layer and side; and codebooks learned on from a stream of text."""

from kvfold.calibrate.calibrate import calibrate
from kvfold.calibrate.ema import Ema
from kvfold.calibrate.sources import HUB, FileText, HubText, parse_source

__all__ = ["HUB", "Ema", "FileText", "HubText", "calibrate", "parse_source"]
