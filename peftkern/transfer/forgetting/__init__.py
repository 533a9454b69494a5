"""What fine-tuning makes a model forget: predicted, measured, and held within a budget."""

from .fisher import FisherFactors, as_pretrained, collect_fisher
from .layers import lora_factors
from .penalty import DeltaPenalty
from .predictions import causal_lm, classifier

__all__ = ["DeltaPenalty", "FisherFactors", "as_pretrained", "causal_lm", "classifier", "collect_fisher", "lora_factors"]
