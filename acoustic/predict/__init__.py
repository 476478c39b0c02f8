"""What a trained model says of any audio: `python -m acoustic.predict MODEL AUDIO ...`, or by `load_predictor`."""

from acoustic.predict.load import load_predictor
from acoustic.predict.predictor import Predictor

__all__ = ["Predictor", "load_predictor"]
