"""Kernel-accelerated core for zeroth-order (forward-only) fine-tuning of language models."""

from pathlib import Path

if not (Path(__file__).parent / "kernels").is_dir():  # a plain checkout: kernels/ and bindings/ are beside us
    __path__.append(str(Path(__file__).parent.parent))

from . import losses, noise, scales
from .calibration import Calibration, calibrate
from .floor import measure
from .journal import Journal, JournalError, replay
from .noise import backend_info
from .optim.adamezo import AdaMeZO
from .optim.base import ZOOptimizer
from .optim.bszo import BSZO
from .optim.fzoo import FZOO
from .optim.hizoo import HiZOO
from .optim.lezo import LeZO
from .optim.meazo import MEAZO
from .optim.mezo import MeZO
from .optim.spsa import SPSA

__all__ = [
    "BSZO",
    "FZOO",
    "MEAZO",
    "SPSA",
    "AdaMeZO",
    "Calibration",
    "HiZOO",
    "Journal",
    "JournalError",
    "LeZO",
    "MeZO",
    "ZOOptimizer",
    "backend_info",
    "calibrate",
    "losses",
    "measure",
    "noise",
    "replay",
    "scales",
]
__version__ = "0.1.0"
