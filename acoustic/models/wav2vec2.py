"""wav2vec 2.0 (Baevski 2020, arXiv 2006.11477): transformers' model and head, with the loss on masked frames only."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers
from transformers.models.wav2vec2 import modeling_wav2vec2

from acoustic.models.contrastive import contrastive_logits, count_correct, draw_negatives
from acoustic.models.masking import draw_span_mask

# What a checkpoint without a pretraining head lacks.
HEAD_MODULES = ("quantizer", "project_hid", "project_q")


@dataclass
class Wav2Vec2ForPreTrainingOutput(modeling_wav2vec2.Wav2Vec2ForPreTrainingOutput):
    """transformers' output. Losses are sums over `num_targets` masked frames; `metrics` are detached sums likewise."""

    num_targets: torch.Tensor | None = None
    metrics: dict | None = None


class Wav2Vec2ForPreTraining(transformers.Wav2Vec2ForPreTraining):
    """Parameters and checkpoint of transformers' class of this name; `forward` skips what the loss throws away.

    The stock forward quantizes and scores all frames and masks the result; this one selects the masked frames first.
    """

    def draw_targets(
        self,
        input_values: torch.Tensor,
        generator: torch.Generator,
        *,
        mask_prob: float,
        mask_length: int,
        negatives_from: str,
    ) -> dict:
        """Masked frames and negatives for a (batch, samples) input: the rest of what `forward` needs."""
        frames = int(self._get_feat_extract_output_lengths(input_values.shape[1]))
        mask = draw_span_mask(len(input_values), frames, mask_prob, mask_length, generator)
        negatives = draw_negatives(mask, self.config.num_negatives, negatives_from, generator)
        return {"mask_time_indices": mask, "sampled_negative_indices": negatives}

    def quantize(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gumbel-softmax product quantization, straight-through in training and argmax in evaluation (section 3.2).

        Args:
            features: (masked, conv channels).

        Returns:
            codevectors (masked, codevector_dim), codes (masked, groups) int, the perplexity of the mean softmax
            ("prob") and of the chosen codes ("code"), each summed over the groups: at most groups * entries.
        """
        quantizer = self.quantizer
        logits = quantizer.weight_proj(features).float().view(-1, quantizer.num_groups, quantizer.num_vars)
        codes = logits.argmax(-1)
        one_hot = F.one_hot(codes, quantizer.num_vars).type_as(logits)
        if self.training:
            choice = F.gumbel_softmax(logits, tau=quantizer.temperature, hard=True)
            codes = choice.argmax(-1)
        else:
            choice = one_hot
        codebooks = quantizer.codevectors.view(quantizer.num_groups, quantizer.num_vars, -1)
        codevectors = torch.einsum("mgv,gvd->mgd", choice.type_as(codebooks), codebooks).flatten(1)
        prob_perplexity, code_perplexity = perplexity(logits.softmax(-1)), perplexity(one_hot)
        return codevectors, codes, prob_perplexity, code_perplexity

    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        mask_time_indices: torch.Tensor | None = None,
        sampled_negative_indices: torch.Tensor | None = None,
        **kwargs,
    ) -> Wav2Vec2ForPreTrainingOutput:
        """The contrastive task of section 3.2, in transformers' own arguments.

        Args:
            input_values: (batch, samples) float32.
            mask_time_indices: (batch, frames) bool.
            sampled_negative_indices: (batch, frames, negatives) int64 into the flattened (batch * frames); masked
                frames only.
        """
        outputs = self.wav2vec2(
            input_values, attention_mask=attention_mask, mask_time_indices=mask_time_indices, **kwargs
        )
        positions = mask_time_indices.flatten().nonzero().squeeze(1)
        predictions = self.project_hid(outputs.last_hidden_state.flatten(0, 1)[positions])
        features = self.dropout_features(outputs.extract_features.flatten(0, 1)[positions])
        codevectors, codes, prob_perplexity, code_perplexity = self.quantize(features)
        targets = self.project_q(codevectors.to(self.project_q.weight.dtype))

        frame_to_target = torch.zeros(mask_time_indices.numel(), dtype=torch.int64, device=positions.device)
        frame_to_target[positions] = torch.arange(len(positions), device=positions.device)
        negatives = frame_to_target[sampled_negative_indices.flatten(0, 1)[positions]]
        logits = contrastive_logits(predictions, targets, codes, negatives, self.config.contrastive_logits_temperature)

        num_targets = torch.tensor(len(positions), device=logits.device)
        contrastive_loss = F.cross_entropy(logits, torch.zeros_like(positions), reduction="sum")
        num_codevectors = self.config.num_codevector_groups * self.config.num_codevectors_per_group
        # transformers' definition: of the softmax in training, of the codes chosen in evaluation.
        used = prob_perplexity if self.training else code_perplexity
        diversity_loss = (num_codevectors - used) / num_codevectors * num_targets
        return Wav2Vec2ForPreTrainingOutput(
            loss=contrastive_loss + self.config.diversity_loss_weight * diversity_loss,
            codevector_perplexity=used,
            contrastive_loss=contrastive_loss,
            diversity_loss=diversity_loss,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            num_targets=num_targets,
            metrics={
                "contrastive_loss": contrastive_loss.detach(),
                "diversity_loss": diversity_loss.detach(),
                "accuracy": count_correct(logits.detach()),
                "code_perplexity": code_perplexity.detach() * num_targets,
                "prob_perplexity": prob_perplexity.detach() * num_targets,
            },
        )


def perplexity(probs: torch.Tensor) -> torch.Tensor:
    """exp(entropy) of the mean distribution over masked frames, summed over groups; probs: (masked, groups, V)."""
    marginal = probs.mean(0)
    return torch.exp(-torch.xlogy(marginal, marginal).sum(-1)).sum()
