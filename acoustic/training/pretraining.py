"""What is computed on a pretraining batch: the seed of its targets, the objective's sums, the annealed temperature."""

import math
import os

import numpy as np
import torch

from acoustic.console import UserError
from acoustic.models.quantizers import GUMBEL_OPTIONS
from acoustic.training.checks import FAMILIES
from acoustic.training.health import Facts, HealthWatch


class PretrainingStep:
    """Everything random is drawn from (seed, update, process, micro-batch), so a batch is the same anywhere.

    Args:
        model: one of `acoustic.models.OBJECTIVES`.
    """

    def __init__(self, model, args):
        self.model, self.args = model, args
        self.metric_names = tuple(model.metric_names)
        self.sum_names = ("loss", "targets", "frames", *self.metric_names)
        self.drops_layers = getattr(model.config, "layerdrop", 0.0) > 0
        self.anneals = getattr(model, "anneals", False)
        unused = sorted(set(GUMBEL_OPTIONS) & args.on_command_line)
        if unused and not self.anneals:
            raise UserError(
                f"{unused[0]}: quantizer_type {model.config.quantizer_type!r} has no temperature to anneal"
            )

    def make_watch(self, update_seconds: float) -> HealthWatch:
        """update_seconds: audio in an update."""
        args = self.args
        facts = Facts(
            **choices(self.model),
            max_steps=args.max_steps,
            warmup_steps=0 if args.lr_scheduler_type == "constant" else args.get_warmup_steps(args.max_steps),
            learning_rate=args.learning_rate,
            update_seconds=update_seconds,
            num_workers=args.dataloader_num_workers,
            cores=max((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1),
        )
        return HealthWatch(facts, FAMILIES[self.model.family])

    def add_targets(self, batch: dict, seed: tuple[int, ...]) -> None:
        """What the model draws its targets from; seed: (seed, update, process, micro-batch)."""
        batch["seed"] = one_seed(seed)
        if self.drops_layers:
            # The same layers on all processes: none of them then waits for one that has more to compute.
            run, update, _, index = seed
            batch["kept_layers"] = self.model.draw_kept_layers(
                torch.Generator().manual_seed(one_seed((run, update, index, 2**31)))
            )

    def count_targets(self, batch: dict) -> int:
        return self.model.count_targets(*batch["input_values"].shape)

    def before_forward(self, model, update: int) -> None:
        if self.anneals:
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
        """Sums -> nats (or distances) per target, fractions, perplexities."""
        targets = totals["targets"] or math.nan  # where nothing could be measured, 0 would read as a perfect loss
        means = {name: totals[name] / targets for name in ("loss", *self.metric_names)}
        if self.model.family != "predictive":  # there, a frame is a target of several steps ahead
            means["masked_fraction"] = totals["targets"] / max(totals["frames"], 1.0)
        return means

    def log_values(self, update: int) -> dict[str, float]:
        values = {"gumbel_temperature": self.temperature(max(update - 1, 0))} if self.anneals else {}
        if self.args.compile_options is not None:
            from torch._dynamo.utils import counters

            values["compiled_graphs"] = counters["stats"]["unique_graphs"]
        return values

    def collect(self, outputs, batch: dict) -> list:
        return []

    def metrics(self, collected: list) -> dict[str, float]:
        return {}


def choices(model) -> dict:
    """What a target is told from, and how many codes there are to be used."""
    groups, codes = model.codes if hasattr(model, "codes") else (0, 0)
    return {
        "num_negatives": getattr(model.config, "num_negatives", 0),
        "num_codes": groups * codes,
        "num_groups": groups,
        "objective": model.config.model_type,
        "negatives_from": getattr(model.config, "negatives_from", ""),
        "binary": getattr(model.config, "loss_type", "") == "binary",
    }


def one_seed(numbers: tuple[int, ...]) -> int:
    """Of several, below 2^63."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
