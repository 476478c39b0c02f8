"""The learning rate of fairseq's wav2vec 2.0 fine-tuning."""

import math
from collections.abc import Callable

WARMUP, HOLD = 0.1, 0.4
START_SCALE, END_SCALE = 0.01, 0.05


def tri_stage(max_steps: int) -> Callable[[int], float]:
    """Factor on the learning rate by update: 10 % linear warmup from .01, 40 % hold, 50 % exponential decay to .05."""
    warmup, hold = max(round(WARMUP * max_steps), 1), round(HOLD * max_steps)
    decay = max(max_steps - warmup - hold, 1)

    def factor(step: int) -> float:
        if step < warmup:
            return START_SCALE + (1 - START_SCALE) * step / warmup
        progress = min(max(step - warmup - hold, 0) / decay, 1.0)
        return math.exp(progress * math.log(END_SCALE))

    return factor
