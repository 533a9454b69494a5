"""What fine-tuning makes a model forget: predicted, measured, and held within a budget."""

from .budget import Calibration, ForgetBudget
from .fisher import FisherFactors, collect_fisher
from .gradients import as_pretrained
from .guard import ForgettingGuard
from .layers import lora_factors
from .measure import SourceRise, WindowLosses, measure_forgetting, source_rise, window_losses
from .pareto import ParetoFront, Point
from .penalty import DeltaPenalty
from .predictions import causal_lm, classifier
from .replay import Replay
from .terms import ExpansionTerms, expansion_terms

__all__ = [
    "Calibration",
    "DeltaPenalty",
    "ExpansionTerms",
    "FisherFactors",
    "ForgetBudget",
    "ForgettingGuard",
    "ParetoFront",
    "Point",
    "Replay",
    "SourceRise",
    "WindowLosses",
    "as_pretrained",
    "causal_lm",
    "classifier",
    "collect_fisher",
    "expansion_terms",
    "lora_factors",
    "measure_forgetting",
    "source_rise",
    "window_losses",
]
