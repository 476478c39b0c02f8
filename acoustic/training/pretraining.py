"""What is computed on a pretraining batch: the seed of its targets, the objective's sums, the annealed temperature."""

import math
import os

import numpy as np
import torch

from acoustic.training.health import Facts, HealthWatch


class PretrainingStep:
    """Everything random is drawn from (seed, update, process, micro-batch), so a batch is the same anywhere."""

    def __init__(self, model, args):
        self.model, self.args = model, args
        penalised = getattr(model.config, "feature_penalty_weight", 0.0) > 0
        self.metric_names = (*METRICS, "feature_penalty") if penalised else METRICS
        self.sum_names = ("loss", "targets", "frames", *self.metric_names)

    def make_watch(self, update_seconds: float) -> HealthWatch:
        """update_seconds: audio in an update."""
        config, args = self.model.config, self.args
        facts = Facts(
            num_negatives=config.num_negatives,
            num_codes=config.num_codevector_groups * config.num_codevectors_per_group,
            num_groups=config.num_codevector_groups,
            max_steps=args.max_steps,
            warmup_steps=args.get_warmup_steps(args.max_steps),
            learning_rate=args.learning_rate,
            update_seconds=update_seconds,
            num_workers=args.dataloader_num_workers,
            cores=max((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1),
        )
        return HealthWatch(facts)

    def add_targets(self, batch: dict, seed: tuple[int, ...]) -> None:
        """What the model draws its targets from; seed: (seed, update, process, micro-batch)."""
        batch["seed"] = one_seed(seed)
        if self.model.config.layerdrop > 0:
            # The same layers on all processes: none of them then waits for one that has more to compute.
            run, update, _, index = seed
            batch["kept_layers"] = self.model.draw_kept_layers(
                torch.Generator().manual_seed(one_seed((run, update, index, 2**31)))
            )

    def count_targets(self, batch: dict) -> int:
        return self.model.count_targets(*batch["input_values"].shape)

    def before_forward(self, model, update: int) -> None:
        model.set_gumbel_temperature(self.temperature(update))

    def temperature(self, update: int) -> float:
        """Annealed per optimizer update, whatever the number of micro-batches."""
        decayed = self.args.gumbel_temperature_start * self.args.gumbel_temperature_decay**update
        return max(decayed, self.args.gumbel_temperature_floor)

    def forward(self, model, batch: dict):
        return model(**batch)

    def smallest(self, batch: dict) -> dict:
        """A part of a batch that takes little memory."""
        return {**batch, "input_values": batch["input_values"][:1]}

    def sums(self, outputs, batch: dict) -> tuple[torch.Tensor, dict]:
        counts = {"targets": outputs.num_targets, "frames": outputs.num_frames}
        return outputs.loss, {"loss": outputs.loss.detach(), **counts, **outputs.metrics}

    def means(self, totals: dict[str, float]) -> dict[str, float]:
        """Sums -> nats per masked frame, fractions, perplexities."""
        targets = totals["targets"] or math.nan  # where nothing could be measured, 0 would read as a perfect loss
        means = {name: totals[name] / targets for name in ("loss", *self.metric_names)}
        means["masked_fraction"] = totals["targets"] / max(totals["frames"], 1.0)
        return means

    def log_values(self, update: int) -> dict[str, float]:
        values = {"gumbel_temperature": self.temperature(max(update - 1, 0))}
        if self.args.compile_options is not None:
            from torch._dynamo.utils import counters

            values["compiled_graphs"] = counters["stats"]["unique_graphs"]
        return values

    def collect(self, outputs, batch: dict) -> list:
        return []

    def metrics(self, collected: list) -> dict[str, float]:
        return {}


METRICS = (
    "contrastive_loss",
    "diversity_loss",
    "accuracy",
    "code_perplexity",
    "lowest_group_perplexity",
    "prob_perplexity",
)


def one_seed(numbers: tuple[int, ...]) -> int:
    """Of several, below 2^63."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
