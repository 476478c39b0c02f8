"""Frames to codes, in training differentiable: by a Gumbel softmax, or as the nearest codeword (k-means).

A frame is cut into groups, and each group takes one entry of a codebook (Baevski 2019, arXiv 1910.05453, section 3).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

# Options of a run that anneal a Gumbel softmax.
GUMBEL_OPTIONS = ("gumbel_temperature_start", "gumbel_temperature_floor", "gumbel_temperature_decay")


class Quantized(NamedTuple):
    """
    frames: (batch, frames, dim), what the codes stand for, with gradients.
    codes: (batch, frames, groups) int64; the likeliest, also where others are drawn.
    loss: what pulls codewords and frames together, a mean over all values; None where nothing does.
    """

    frames: torch.Tensor
    codes: torch.Tensor
    loss: torch.Tensor | None


class GumbelQuantizer(nn.Module):
    """A softmax over the entries, of which the hard choice goes on and the soft one has the gradient (section 3.1).

    Args:
        dim: width of a frame.
        groups, entries: of the codebook.
        shared: one codebook for all groups.
    """

    def __init__(self, dim: int, groups: int, entries: int, shared: bool):
        super().__init__()
        self.groups, self.entries = groups, entries
        self.hidden = nn.Linear(dim, 2 * dim)
        self.weight_proj = nn.Linear(2 * dim, groups * entries)
        self.codevectors = nn.Parameter(torch.empty(1 if shared else groups, entries, dim // groups))
        self.temperature: float | torch.Tensor = 2.0

    def set_temperature(self, temperature: float) -> None:
        """As a tensor, so that annealing it neither recompiles a graph nor waits for the device."""
        if not isinstance(self.temperature, torch.Tensor):
            self.temperature = torch.tensor(float(temperature))
        self.temperature = self.temperature.to(self.codevectors.device)
        self.temperature.fill_(temperature)

    def forward(self, frames: torch.Tensor, real: torch.Tensor | None = None, sample: bool = False) -> Quantized:
        """
        Args:
            frames: (batch, frames, dim). `real` isn't needed: each frame is taken by itself.
            sample: draw the choice (training); else the likeliest entry is taken.
        """
        logits = self.weight_proj(F.gelu(self.hidden(frames))).float().unflatten(-1, (self.groups, self.entries))
        if sample:
            choice = F.gumbel_softmax(logits, tau=self.temperature, hard=True)
        else:
            soft = logits.softmax(-1)
            choice = torch.zeros_like(soft).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0) + soft - soft.detach()
        codebooks = self.codevectors.expand(self.groups, -1, -1)
        quantized = torch.einsum("...gv,gvd->...gd", choice.type_as(codebooks), codebooks).flatten(-2)
        return Quantized(quantized, logits.argmax(-1), None)

    def reset_parameters(self) -> None:
        init.normal_(self.hidden.weight, std=self.hidden.in_features**-0.5)
        # As wav2vec 2.0's: with small logits the noise decides, all frames sound alike, and nothing is ever learned.
        init.normal_(self.weight_proj.weight, std=1.0)
        init.zeros_(self.hidden.bias)
        init.zeros_(self.weight_proj.bias)
        init.uniform_(self.codevectors)


class KmeansQuantizer(nn.Module):
    """The nearest codeword by distance, its gradient passed on to the frame (section 3.2).

    Before that a linear map within each group, and a norm over a group's channels and times, padding left out.
    loss = mse(codeword, sg(frame)) + .25 mse(frame, sg(codeword)).
    """

    commitment = 0.25

    def __init__(self, dim: int, groups: int, entries: int, shared: bool):
        super().__init__()
        self.groups, self.entries = groups, entries
        self.projection = nn.Conv1d(dim, dim, 1, groups=groups, bias=False)
        self.norm = nn.GroupNorm(groups, dim)
        self.codevectors = nn.Parameter(torch.empty(1 if shared else groups, entries, dim // groups))

    def forward(self, frames: torch.Tensor, real: torch.Tensor | None = None, sample: bool = False) -> Quantized:
        """frames: (batch, frames, dim); real: (batch, frames) bool, None where none is padded. Nothing is sampled."""
        projected = self.projection(frames.transpose(1, 2)).float()
        with torch.autocast(frames.device.type, enabled=False):
            normed = group_norm(projected, self.norm, real).transpose(1, 2).unflatten(-1, (self.groups, -1))
            codebooks = self.codevectors.expand(self.groups, -1, -1).float()
            codes = nearest(normed.detach(), codebooks.detach())
            chosen = look_up(codebooks, codes)
            loss = F.mse_loss(chosen, normed.detach()) + self.commitment * F.mse_loss(normed, chosen.detach())
            quantized = (normed + (chosen - normed).detach()).flatten(-2)
        return Quantized(quantized.to(frames.dtype), codes, loss)

    def reset_parameters(self) -> None:
        init.normal_(self.projection.weight, std=self.projection.weight.shape[1] ** -0.5)
        init.ones_(self.norm.weight)
        init.zeros_(self.norm.bias)
        init.normal_(self.codevectors, std=0.3)


QUANTIZERS = {"gumbel": GumbelQuantizer, "kmeans": KmeansQuantizer}


def group_norm(x: torch.Tensor, norm: nn.GroupNorm, real: torch.Tensor | None) -> torch.Tensor:
    """x: (batch, channels, frames) float32; mean and variance of each group over the real frames only."""
    if real is None:
        return norm(x)
    grouped, real = x.unflatten(1, (norm.num_groups, -1)), real[:, None, None]
    count = (real.sum(-1, keepdim=True) * grouped.shape[2]).clamp(min=1)
    mean = (grouped * real).sum((2, 3), keepdim=True) / count
    variance = ((grouped - mean) * real).square().sum((2, 3), keepdim=True) / count
    normed = ((grouped - mean) * (variance + norm.eps).rsqrt()).flatten(1, 2)
    return normed * norm.weight[:, None] + norm.bias[:, None]


def nearest(frames: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
    """(batch, frames, groups, d) and (groups, entries, d) -> (batch, frames, groups), by one product."""
    products = torch.einsum("btgd,gvd->btgv", frames, codebooks)
    return (codebooks.square().sum(-1) - 2 * products).argmin(-1)


def look_up(codebooks: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """(groups, entries, d) and (batch, frames, groups) -> (batch, frames, groups, d)."""
    starts = torch.arange(len(codebooks), device=codes.device) * codebooks.shape[1]
    return F.embedding(codes + starts, codebooks.flatten(0, 1))


def count_codes(codes: torch.Tensor, entries: int) -> torch.Tensor:
    """(..., groups) int64 -> how often each is there, (groups, entries) int64."""
    codes = codes.flatten(0, -2).T
    counts = torch.zeros(len(codes), entries, dtype=torch.int64, device=codes.device)
    return counts.scatter_add_(1, codes, torch.ones_like(codes))


def code_metrics(codes: torch.Tensor, entries: int, num_targets: int) -> dict[str, torch.Tensor]:
    """Perplexity of the codes in use, exp(entropy), times the targets: summed over the groups, and the lowest."""
    shares = count_codes(codes, entries).float() / codes[..., 0].numel()
    perplexities = torch.exp(-torch.xlogy(shares, shares).sum(-1))
    return {
        "code_perplexity": perplexities.sum() * num_targets,
        "lowest_group_perplexity": perplexities.amin() * num_targets,
    }
