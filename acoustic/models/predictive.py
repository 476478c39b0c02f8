"""Predicting frames several steps ahead and telling them from others: what wav2vec, vq-wav2vec and CPC share.

From the context c_t a linear map for each step k predicts the features z at time t + offset + k. The dot product with
them is told from those with negatives, other frames, of which each target time has one draw for all of its steps.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import initialization as init
from transformers.utils import ModelOutput

from acoustic.models.wave_encoder import WaveConfig, check_at_least_1, check_choice

NEGATIVES_FROM = ("utterance", "batch")
LOSS_TYPES = ("binary", "infonce")


class PredictiveConfig(WaveConfig):
    """What the configs of predictive systems share; defaults are wav2vec's (Schneider 2019, arXiv 1904.05862).

    Args:
        num_steps: steps ahead that are predicted.
        offset: of the first of them, in frames; "auto": the fewest at which its frame begins where the last one that
            the context has seen in full ends, receptive field / stride rounded up.
        num_negatives: frames that each target is told from.
        negatives_from: "utterance", the same window; "batch", all windows.
        loss_type: "binary", each candidate is judged by itself; "infonce", a choice among all.
    """

    num_steps: int = 12
    offset: int | str = "auto"
    num_negatives: int = 10
    negatives_from: str = "utterance"
    loss_type: str = "binary"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_at_least_1(self, "num_steps", "num_negatives", *(["offset"] if self.offset != "auto" else []))
        check_choice(self, "negatives_from", NEGATIVES_FROM)
        check_choice(self, "loss_type", LOSS_TYPES)

    @property
    def first_step(self) -> int:
        """Frames from a context to the first one that it predicts."""
        return -(-self.receptive_field // self.inputs_to_logits_ratio) if self.offset == "auto" else self.offset


@dataclass
class PredictiveOutput(ModelOutput):
    """The loss is a sum over `num_targets` positives; so are the `metrics`, detached."""

    loss: torch.Tensor | None = None
    num_targets: int | None = None
    num_frames: int | None = None
    metrics: dict | None = None


class StepPredictor(nn.Module):
    """A linear map for each step ahead, all as one matrix; the bias, where there is one, is the same for all."""

    def __init__(self, hidden_size: int, feature_size: int, num_steps: int, bias: bool):
        super().__init__()
        self.num_steps = num_steps
        self.weight = nn.Parameter(torch.empty(num_steps * feature_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(feature_size)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Dot products of a prediction with the features start small, so that all candidates are alike."""
        steps_dim, hidden_size = self.weight.shape
        init.normal_(self.weight, std=(steps_dim // self.num_steps * hidden_size) ** -0.5)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        """(rows, frames, hidden_size) -> (rows, frames, steps, feature_size)."""
        bias = None if self.bias is None else self.bias.repeat(self.num_steps)
        return F.linear(context, self.weight, bias).unflatten(-1, (self.num_steps, -1))


class PredictiveObjective:
    """What the pretraining classes share. In the bases of one it comes before the system's `XPreTrainedModel`.

    One that has more losses, or other targets than the features, has a forward of its own around `predict`.
    """

    family = "predictive"
    normalizes_audio = False
    # No option of a run is this objective's alone; its settings are those of its config.
    config_options = ()
    options = ()
    pretraining_config = {}
    encoder_class: type
    predictor_bias: bool

    def __init__(self, config):
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.encoder_class(config))
        self.predictor = StepPredictor(
            config.hidden_size, config.feature_size, config.num_steps, bias=self.predictor_bias
        )
        self.post_init()

    def get_input_embeddings(self) -> None:
        """Audio has no table of tokens."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        steps = range(1, self.config.num_steps + 1)
        return ("contrastive_loss", "accuracy", *(f"accuracy_{step}" for step in steps))

    def count_frames(self, samples: int) -> int:
        return self.base_model._get_feat_extract_output_lengths(samples)

    def count_targets(self, rows: int, samples: int) -> int:
        """Positives of a batch; 0 where a window is too short for the last step."""
        return rows * sum(count_positives(self.count_frames(samples), self.config.first_step, self.config.num_steps))

    def compile_regions(self, **options) -> None:
        """`torch.compile` for the encoder's parts. The loss stays as it is: matrix products and a few scalars each."""
        self.base_model.compile_regions(**options)

    def forward(self, input_values: torch.Tensor, seed: int | None = None) -> PredictiveOutput:
        """
        Args:
            input_values: (rows, samples) float32, without padding.
            seed: of the negatives; without one it is drawn from torch's CPU generator.
        """
        self.check_length(input_values.shape[1])
        features = self.base_model.extract_features(input_values)
        context = self.base_model.contextualize(features).last_hidden_state
        return self.predict(context, features, seed)

    def check_length(self, samples: int) -> None:
        if self.count_targets(1, samples) < 1:
            needed, steps = self.config.first_step + self.config.num_steps, self.config.num_steps
            raise ValueError(
                f"{samples} samples are {self.count_frames(samples)} frames; to predict {steps} steps ahead takes "
                f"{needed}"
            )

    def predict(self, context: torch.Tensor, features: torch.Tensor, seed: int | None = None) -> PredictiveOutput:
        """The loss and the metrics.

        Args:
            context: (rows, frames, hidden_size).
            features: (rows, frames, feature_size), of which the targets and negatives are taken.
        """
        config, (rows, frames) = self.config, features.shape[:2]
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        generator = torch.Generator(features.device).manual_seed(seed)
        negatives = draw_negatives(
            rows, frames, config.first_step, config.num_negatives, config.negatives_from, generator
        )
        logits, reached = score(self.predictor(context), features, negatives)
        loss = (candidate_loss(logits, config.loss_type) * reached).sum()
        counts = count_positives(frames, config.first_step, config.num_steps)
        metrics = {"contrastive_loss": loss.detach(), **accuracies(logits.detach(), reached, counts)}
        return PredictiveOutput(loss, rows * sum(counts), rows * frames, metrics)


def count_positives(frames: int, offset: int, steps: int) -> list[int]:
    """Targets of each step in a window; all 0 where the last step has none."""
    if frames < offset + steps:
        return [0] * steps
    return [frames - offset - step for step in range(steps)]


def draw_negatives(
    rows: int, frames: int, offset: int, num_negatives: int, negatives_from: str, generator: torch.Generator
) -> torch.Tensor:
    """Uniform with replacement, never the target itself: one draw for each target time, shared by all steps.

    Args:
        negatives_from: "utterance", frames of the same window (Schneider 2019, section 2.2); "batch", of all windows
            (van den Oord 2018, arXiv 1807.03748, section 2.3).

    Returns:
        (rows, frames - offset, num_negatives) int64 into the flattened (rows * frames): of times `offset` and later.
    """
    device = generator.device
    shape = (rows, frames - offset, num_negatives)
    times = torch.arange(offset, frames, device=device)[:, None]
    starts = torch.arange(rows, device=device)[:, None, None] * frames
    if negatives_from == "batch":
        negatives = torch.randint(rows * frames - 1, shape, generator=generator, device=device)
        return negatives.add_(negatives >= starts + times)
    negatives = torch.randint(frames - 1, shape, generator=generator, device=device)
    return negatives.add_(negatives >= times).add_(starts)


def score(
    predictions: torch.Tensor, features: torch.Tensor, negatives: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dot products of the predictions with their target (column 0) and its negatives, in float32.

    Args:
        predictions: (rows, frames, steps, feature_size).
        features: (rows, frames, feature_size).
        negatives: (rows, targets, num_negatives), of `draw_negatives`.

    Returns:
        logits (rows, targets, steps, 1 + num_negatives), and whether a target is reached by that many steps from
        within the window, (targets, steps) bool: the first of them aren't by all.
    """
    (rows, frames, steps), (targets, device) = predictions.shape[:3], (negatives.shape[1], features.device)
    starts = torch.arange(rows, device=device)[:, None, None] * frames
    times = torch.arange(frames - targets, frames, device=device)[:, None]
    candidates = torch.cat([starts + times, negatives], dim=2).flatten(0, 1)
    # Where a prediction comes from, by target and step.
    step = torch.arange(steps, device=device)
    origins = torch.arange(targets, device=device)[:, None] - step
    reached = origins >= 0
    predicted = ((starts + origins.clamp(min=0)) * steps + step).flatten(0, 1)
    with torch.autocast(device.type, enabled=False):
        logits = Score.apply(predictions.flatten(0, 2).float(), features.flatten(0, 1).float(), predicted, candidates)
    return logits.unflatten(0, (rows, targets)), reached


class Score(torch.autograd.Function):
    """Dot products of the rows (R, K) of one matrix with the rows (R, C) of another: (R, K, C).

    A block after the other: what is gathered never leaves the cache of a CPU, and a batch of any size takes no more
    memory. Measured on one core, with 10 or 128 negatives, widths of 128 to 512: 1.3 to 4 times as fast as gathering
    all at once, and at least twice as fast as one matrix of all similarities, of which few are wanted.
    """

    @staticmethod
    def forward(ctx, left, right, left_rows, right_rows):
        ctx.save_for_backward(left, right, left_rows, right_rows)
        logits = left.new_empty(*left_rows.shape, right_rows.shape[1])
        for part in blocks(right_rows, right):
            rows, others = gather(left, left_rows[part]), gather(right, right_rows[part])
            torch.bmm(rows, others.transpose(1, 2), out=logits[part])
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        left, right, left_rows, right_rows = ctx.saved_tensors
        grad_left, grad_right = torch.zeros_like(left), torch.zeros_like(right)
        with torch.autocast(grad.device.type, enabled=False):
            for part in blocks(right_rows, right):
                rows, others = gather(left, left_rows[part]), gather(right, right_rows[part])
                scatter(grad_left, left_rows[part], grad[part] @ others)
                scatter(grad_right, right_rows[part], grad[part].transpose(1, 2) @ rows)
        return grad_left, grad_right, None, None


def blocks(index: torch.Tensor, source: torch.Tensor):
    """Slices of `index`, in each of which about 1 MB is gathered on a CPU, 256 MB elsewhere."""
    limit = 2**18 if source.device.type == "cpu" else 2**26
    size = max(limit // (index.shape[1] * source.shape[1]), 1)
    return [slice(start, start + size) for start in range(0, len(index), size)]


def gather(source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(n, width), (R, C) -> (R, C, width)."""
    return source.index_select(0, index.flatten()).unflatten(0, index.shape)


def scatter(total: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> None:
    """The reverse: adds (R, C, width) to the rows of (n, width)."""
    total.index_add_(0, index.flatten(), values.flatten(0, 1))


def candidate_loss(logits: torch.Tensor, loss_type: str) -> torch.Tensor:
    """Nats of each positive, (..., 1 + negatives) -> (...).

    "binary": its own binary cross-entropy and those of its negatives together (Schneider 2019, equation 2; their
    weight there, lambda, is the number of negatives). "infonce": van den Oord 2018, equation 4.
    """
    if loss_type == "infonce":
        return logits.logsumexp(-1) - logits[..., 0]
    return F.softplus(-logits[..., 0]) + F.softplus(logits[..., 1:]).sum(-1)


def chance_loss(loss_type: str, num_negatives: int) -> float:
    """Nats per positive of equal logits: of a fresh model.

    For "infonce" nobody does better who can't tell the target; for "binary" one who gives every candidate the odds
    of 1 to num_negatives does, at C log C - N log N with C = N + 1.
    """
    candidates = 1 + num_negatives
    return candidates * math.log(2) if loss_type == "binary" else math.log(candidates)


def accuracies(logits: torch.Tensor, reached: torch.Tensor, counts: list[int]) -> dict[str, torch.Tensor]:
    """How often the positive is named among its negatives: over all, and of each step ahead, as `accuracy_1`, ...

    Args:
        logits, reached: of `score`.
        counts: positives of each step in a window.

    Returns:
        Sums that divided by the number of positives give the mean: those of a step are scaled by its share.
    """
    positive, negatives = logits[..., :1], logits[..., 1:]
    # Negatives with the codes of the positive are equal to it: a guess among them, so that chance is chance.
    won = (negatives <= positive).all(-1) / (1.0 + (negatives == positive).sum(-1))
    correct = (won * reached).sum((0, 1))
    steps = {
        f"accuracy_{step}": number * (sum(counts) / max(count, 1))
        for step, (number, count) in enumerate(zip(correct.unbind(), counts), 1)
    }
    return {"accuracy": correct.sum(), **steps}
