"""kvfold: the KV cache in a fifth of the memory, by residual vector quantization, and attention straight on the codes."""

from kvfold.cache.cache import CacheReport, CompressedCache
from kvfold.cache.saved import load_cache
from kvfold.calibrate import Ema, HubText, calibrate
from kvfold.codecs.artifact import CodecSet, load
from kvfold.errors import CacheFullError, InputError, UnsupportedModelError
from kvfold.integration.attach import attach

__version__ = "0.1.0"

__all__ = [
    "CacheFullError",
    "CacheReport",
    "CodecSet",
    "CompressedCache",
    "Ema",
    "HubText",
    "InputError",
    "UnsupportedModelError",
    "attach",
    "calibrate",
    "load",
    "load_cache",
]
