"""Pretraining systems, a file each; what they share: masking, contrastive, predictive, quantizers, features, heads."""

from acoustic.models.build import build_for_pretraining, load_config, load_feature_extractor, load_weights
from acoustic.models.registry import OBJECTIVES

__all__ = ["OBJECTIVES", "build_for_pretraining", "load_config", "load_feature_extractor", "load_weights"]
