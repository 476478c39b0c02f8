"""What is computed on a pretraining batch: targets from a seed, the objective's sums, the annealed temperature."""

import numpy as np
import torch


class PretrainingStep:
    """Everything random is drawn from (seed, update, process, micro-batch), so a batch is the same anywhere."""

    def __init__(self, model, args):
        self.model, self.args = model, args
        self.sum_names = ("loss", "targets", "frames", *METRICS)

    def add_targets(self, batch: dict, seed: tuple[int, ...]) -> None:
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        targets = self.model.draw_targets(
            batch["input_values"],
            generator,
            mask_prob=self.args.mask_time_prob,
            mask_length=self.args.mask_time_length,
            negatives_from=self.args.negatives_from,
        )
        batch.update(targets)

    def count_targets(self, batch: dict) -> int:
        return int(batch["mask_time_indices"].sum())

    def before_forward(self, model, update: int) -> None:
        model.set_gumbel_temperature(self.temperature(update))

    def temperature(self, update: int) -> float:
        """Annealed per optimizer update, whatever the number of micro-batches."""
        decayed = self.args.gumbel_temperature_start * self.args.gumbel_temperature_decay**update
        return max(decayed, self.args.gumbel_temperature_floor)

    def forward(self, model, batch: dict):
        return model(**batch)

    def sums(self, outputs, batch: dict) -> tuple[torch.Tensor, dict]:
        frames = batch["mask_time_indices"].numel()
        sums = {"loss": outputs.loss.detach(), "targets": outputs.num_targets, "frames": frames, **outputs.metrics}
        return outputs.loss, sums

    def means(self, totals: dict[str, float]) -> dict[str, float]:
        """Sums -> nats per masked frame, fractions, perplexities."""
        targets = max(totals["targets"], 1.0)
        means = {name: totals[name] / targets for name in ("loss", *METRICS)}
        means["masked_fraction"] = totals["targets"] / max(totals["frames"], 1.0)
        return means

    def log_values(self, update: int) -> dict[str, float]:
        return {"gumbel_temperature": self.temperature(max(update - 1, 0))}

    def collect(self, outputs, batch: dict) -> list:
        return []

    def metrics(self, collected: list) -> dict[str, float]:
        return {}


METRICS = ("contrastive_loss", "diversity_loss", "accuracy", "code_perplexity", "prob_perplexity")
