"""Gumbel and k-means quantizers against naive loops: what is chosen, what it stands for, and where gradients go."""

import math

import pytest
import torch
import torch.nn.functional as F

from acoustic.models.quantizers import (
    QUANTIZERS,
    GumbelQuantizer,
    code_metrics,
    count_codes,
    group_norm,
    look_up,
    nearest,
)

GROUPS, ENTRIES, DIM = 2, 5, 8
KINDS = pytest.mark.parametrize("kind", list(QUANTIZERS))
SHARED = pytest.mark.parametrize("shared", [True, False])


def make_quantizer(kind, shared=False):
    torch.manual_seed(0)
    quantizer = QUANTIZERS[kind](DIM, GROUPS, ENTRIES, shared)
    quantizer.reset_parameters()
    with torch.no_grad():
        for parameter in quantizer.parameters():  # no norm that is neutral, no bias that is 0
            parameter.add_(0.1 * torch.randn_like(parameter))
    return quantizer


def make_frames(batch=2, frames=7):
    return torch.randn(batch, frames, DIM, generator=torch.Generator().manual_seed(1))


def book_of(quantizer, group):
    return quantizer.codevectors[0 if len(quantizer.codevectors) == 1 else group]


def rows_of(quantizer, codes):
    """The codebooks' rows of (batch, frames, groups), one after the other."""
    frames = [
        torch.cat([book_of(quantizer, group)[codes[row, time, group]] for group in range(GROUPS)])
        for row in range(codes.shape[0])
        for time in range(codes.shape[1])
    ]
    return torch.stack(frames).view(*codes.shape[:2], DIM)


@KINDS
@SHARED
def test_sizes_and_kinds_of_what_comes_out(kind, shared):
    quantizer = make_quantizer(kind, shared)
    quantized = quantizer(make_frames())
    assert quantized.frames.shape == (2, 7, DIM) and quantized.frames.dtype == torch.float32
    assert quantized.codes.shape == (2, 7, GROUPS) and quantized.codes.dtype == torch.int64
    assert quantizer.codevectors.shape == (1 if shared else GROUPS, ENTRIES, DIM // GROUPS)
    assert (quantized.loss is None) == (kind == "gumbel")
    assert len(quantized.codes.unique()) > 2  # else the comparisons below show little


# ---- Gumbel


def logits_of(quantizer, frames):
    """(batch, frames, groups, entries), from the weights."""
    inner = frames @ quantizer.hidden.weight.T + quantizer.hidden.bias
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    logits = inner @ quantizer.weight_proj.weight.T + quantizer.weight_proj.bias
    return torch.stack(logits.split(ENTRIES, dim=-1), dim=2)


@SHARED
def test_without_noise_the_likeliest_entries_rows_are_taken(shared):
    quantizer, frames = make_quantizer("gumbel", shared), make_frames()
    quantized, logits = quantizer(frames), logits_of(quantizer, frames)
    codes = torch.tensor(
        [[[max(range(ENTRIES), key=group.tolist().__getitem__) for group in time] for time in row] for row in logits]
    )
    assert torch.equal(quantized.codes, codes)
    torch.testing.assert_close(quantized.frames, rows_of(quantizer, codes))
    assert torch.equal(quantizer(frames).frames, quantized.frames)


@SHARED
@pytest.mark.parametrize("temperature", [2.0, 0.5])
def test_drawn_rows_and_their_gradients(shared, temperature):
    """Equations 1 and 2 of Jang 2016 (arXiv 1611.01144): argmax of logits and noise forward, their softmax back."""
    quantizer, frames = make_quantizer("gumbel", shared), make_frames()
    quantizer.set_temperature(temperature)
    torch.manual_seed(3)
    quantized = quantizer(frames, sample=True)
    torch.manual_seed(3)
    logits = logits_of(quantizer, frames)
    noisy = logits - torch.empty_like(logits).exponential_().log()
    drawn = noisy.argmax(-1)
    torch.testing.assert_close(quantized.frames, rows_of(quantizer, drawn))
    assert not torch.equal(drawn, quantized.codes)
    assert torch.equal(quantized.codes, logits.argmax(-1))  # the likeliest, not those that were drawn
    weights = torch.randn(2, 7, DIM)
    (quantized.frames * weights).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in quantizer.named_parameters()}
    quantizer.zero_grad()
    soft = (noisy / temperature).softmax(-1)
    books = [book_of(quantizer, group) for group in range(GROUPS)]
    # The codebook's rows as they were chosen, the choice as it would be if it were soft.
    mixed = [soft[:, :, group] @ books[group].detach() for group in range(GROUPS)]
    expected = (torch.cat(mixed, dim=-1) * weights).sum() + (rows_of(quantizer, drawn) * weights).sum()
    expected.backward()
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad.any()
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_without_noise_gradients_pass_too():
    """Fine-tuning trains the codes of an encoder in eval mode's way, without drawing."""
    quantizer = make_quantizer("gumbel")
    frames = make_frames().requires_grad_()
    (quantizer(frames).frames * torch.randn(2, 7, DIM)).sum().backward()
    assert frames.grad.any()
    assert all(parameter.grad.any() for parameter in quantizer.parameters())


def test_entries_are_drawn_as_often_as_their_softmax_says():
    quantizer = make_quantizer("gumbel")
    frame = make_frames(1, 1)
    torch.manual_seed(0)
    drawn = quantizer(frame.expand(1, 20_000, -1), sample=True).frames[0]
    expected = logits_of(quantizer, frame)[0, 0].softmax(-1)
    for group, part in enumerate(drawn.chunk(GROUPS, dim=1)):
        distances = torch.cdist(part, book_of(quantizer, group))
        assert distances.amin(1).max() < 1e-2  # each is a row
        shares = torch.bincount(distances.argmin(1), minlength=ENTRIES) / len(part)
        torch.testing.assert_close(shares, expected[group].detach(), rtol=0, atol=0.015)


def test_the_published_temperature_is_the_first():
    assert GumbelQuantizer(DIM, GROUPS, ENTRIES, shared=True).temperature == 2.0


def test_a_temperature_does_not_recompile():
    quantizer, frames = make_quantizer("gumbel"), make_frames()
    quantizer.set_temperature(2.0)
    tensor = quantizer.temperature

    def gradients():
        """By temperature; the noise is the same, so only the temperature can change them."""
        found = []
        for temperature in (2.0, 1.0, 0.5):
            quantizer.set_temperature(temperature)
            quantizer.zero_grad()
            torch.manual_seed(0)
            quantizer(frames, sample=True).frames.square().sum().backward()
            found.append(quantizer.hidden.weight.grad.clone())
        return found

    eager = gradients()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    quantizer.compile(backend="aot_eager")
    compiled = gradients()
    torch.testing.assert_close(compiled, eager)
    assert not torch.allclose(eager[0], eager[1]) and not torch.allclose(eager[1], eager[2])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert quantizer.temperature is tensor and tensor.item() == 0.5


# ---- k-means


def normed_of(quantizer, frames):
    """One window's (frames, dim): the linear map of each group, then its norm, from the weights."""
    size, parts = DIM // GROUPS, []
    for group in range(GROUPS):
        own = slice(group * size, (group + 1) * size)
        part = frames[:, own] @ quantizer.projection.weight[own, :, 0].T
        part = (part - part.mean()) / (part.var(correction=0) + 1e-5).sqrt()
        parts.append(part * quantizer.norm.weight[own] + quantizer.norm.bias[own])
    return torch.cat(parts, dim=1)


def nearest_codes(quantizer, normed):
    """(frames, dim) -> (frames, groups), a distance after the other."""
    size, codes = DIM // GROUPS, []
    for frame in normed:
        own = []
        for group in range(GROUPS):
            part = frame[group * size : (group + 1) * size]
            distances = [sum((part - entry) ** 2).item() for entry in book_of(quantizer, group)]
            own.append(distances.index(min(distances)))
        codes.append(own)
    return torch.tensor(codes)


@SHARED
def test_the_nearest_codewords_are_taken(shared):
    quantizer, frames = make_quantizer("kmeans", shared), make_frames()
    quantized = quantizer(frames)
    codes = torch.stack([nearest_codes(quantizer, normed_of(quantizer, window)) for window in frames])
    assert torch.equal(quantized.codes, codes)
    torch.testing.assert_close(quantized.frames, rows_of(quantizer, codes))
    assert torch.equal(quantizer(frames, sample=True).frames, quantized.frames)  # nothing is drawn


@SHARED
def test_the_losses_terms_and_their_gradients(shared):
    """mse(codeword, sg(frame)) moves codewords only, .25 mse(frame, sg(codeword)) what comes before them only."""
    quantizer, frames = make_quantizer("kmeans", shared), make_frames()
    quantized = quantizer(frames)
    quantized.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in quantizer.named_parameters()}
    quantizer.zero_grad()
    pulling = committing = 0.0
    for row, window in enumerate(frames):
        normed = normed_of(quantizer, window)
        chosen = rows_of(quantizer, quantized.codes[row : row + 1])[0]
        for time in range(7):
            for channel in range(DIM):
                pulling += (chosen[time, channel] - normed[time, channel].detach()) ** 2
                committing += (normed[time, channel] - chosen[time, channel].detach()) ** 2
    number = frames.numel()
    torch.testing.assert_close(quantized.loss, (pulling + 0.25 * committing) / number)
    (pulling / number).backward()
    assert quantizer.projection.weight.grad is None and quantizer.norm.weight.grad is None
    torch.testing.assert_close(gradients["codevectors"], quantizer.codevectors.grad)
    (0.25 * committing / number).backward()
    torch.testing.assert_close(gradients["codevectors"], quantizer.codevectors.grad)  # nothing was added
    for name in ("projection.weight", "norm.weight", "norm.bias"):
        own = quantizer.get_parameter(name).grad
        assert own.any()
        torch.testing.assert_close(gradients[name], own, rtol=1e-4, atol=1e-6)


def test_the_frames_gradient_passes_by_the_codewords():
    """As if the quantizer were its projection and norm alone; the codebook has none of it."""
    quantizer, weights = make_quantizer("kmeans"), torch.randn(2, 7, DIM)
    frames = make_frames().requires_grad_()
    (quantizer(frames).frames * weights).sum().backward()
    assert quantizer.codevectors.grad is None or not quantizer.codevectors.grad.any()
    again = make_frames().requires_grad_()
    (torch.stack([normed_of(quantizer, window) for window in again]) * weights).sum().backward()
    assert frames.grad.any()
    torch.testing.assert_close(frames.grad, again.grad, rtol=1e-4, atol=1e-5)


@KINDS
def test_a_padded_window_equals_itself_alone(kind):
    quantizer, frames = make_quantizer(kind), make_frames(3, 9)
    lengths = torch.tensor([9, 4, 1])
    real = torch.arange(9) < lengths[:, None]
    frames = torch.where(real[..., None], frames, 50.0)  # what must not be looked at
    together = quantizer(frames, real)
    for row, length in enumerate(lengths.tolist()):
        alone = quantizer(frames[row : row + 1, :length])
        torch.testing.assert_close(together.frames[row, :length], alone.frames[0])
        assert torch.equal(together.codes[row, :length], alone.codes[0])
    if kind == "kmeans":  # one that looks at all of it chooses otherwise
        assert not torch.equal(quantizer(frames).codes[1, :4], together.codes[1, :4])


def test_the_norm_of_real_frames():
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(GROUPS, DIM)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x, lengths = 3 + torch.randn(3, DIM, 9), [9, 4, 1]
    real = torch.arange(9) < torch.tensor(lengths)[:, None]
    torch.testing.assert_close(group_norm(x, norm, torch.ones(3, 9, dtype=torch.bool)), norm(x))
    torch.testing.assert_close(group_norm(x, norm, None), norm(x))
    masked = group_norm(x, norm, real)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(masked[row, :, :length], norm(x[row : row + 1, :, :length])[0])
    assert group_norm(x, norm, torch.zeros(3, 9, dtype=torch.bool)).isfinite().all()


def test_equal_distances_and_large_values():
    """One product instead of differences: its rounding must not choose another codeword."""
    torch.manual_seed(0)
    codebooks = 10 + torch.randn(3, 50, 4)
    frames = codebooks[torch.arange(3), torch.randint(50, (2, 20, 3))] + 1e-2 * torch.randn(2, 20, 3, 4)
    distances = (frames[:, :, :, None].double() - codebooks.double()).square().sum(-1)
    codes = nearest(frames, codebooks)
    assert torch.equal(codes, distances.argmin(-1))
    chosen = torch.stack([codebooks[group][codes[..., group]] for group in range(3)], dim=2)
    assert torch.equal(look_up(codebooks, codes), chosen)
    assert nearest(torch.zeros(1, 1, 1, 2), torch.ones(1, 4, 2)).item() == 0  # the first of equals


@KINDS
def test_half_precision_keeps_codebook_rows(kind):
    """Frames in the autocast type, the distances and the softmax in float32."""
    quantizer, frames = make_quantizer(kind), make_frames()
    with torch.autocast("cpu", torch.bfloat16):
        quantized = quantizer(frames, sample=False)
    expected = rows_of(quantizer, quantized.codes)
    torch.testing.assert_close(quantized.frames.float(), expected, rtol=0.01, atol=0.01)
    if kind == "kmeans":
        assert quantized.loss.dtype == torch.float32
        assert quantized.loss.item() == pytest.approx(quantizer(frames).loss.item(), rel=0.02)


# ---- how many codes are in use


def test_codes_are_counted():
    codes = torch.randint(ENTRIES, (3, 7, GROUPS), generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(GROUPS, ENTRIES, dtype=torch.int64)
    for frame in codes.reshape(-1, GROUPS).tolist():
        for group, code in enumerate(frame):
            expected[group, code] += 1
    assert torch.equal(count_codes(codes, ENTRIES), expected)
    assert not torch.equal(expected[0], expected[1])


def test_perplexities_equal_a_naive_count():
    codes = torch.randint(ENTRIES, (3, 7, 3), generator=torch.Generator().manual_seed(0))
    codes[..., 1] = codes[..., 1].clamp(max=1)  # two in use
    codes[..., 2] = 4  # one
    perplexities = []
    for group in range(3):
        shares = [codes[..., group].flatten().tolist().count(code) / 21 for code in range(ENTRIES)]
        perplexities.append(math.exp(-sum(share * math.log(share) for share in shares if share)))
    metrics = code_metrics(codes, ENTRIES, num_targets=10)
    assert metrics["code_perplexity"].item() == pytest.approx(10 * sum(perplexities), rel=1e-5)
    assert metrics["lowest_group_perplexity"].item() == pytest.approx(10 * 1.0)
    assert min(perplexities) == perplexities[2] < perplexities[1] <= 2 < perplexities[0]
    even = torch.arange(ENTRIES)[None, :, None].expand(1, -1, 2)
    assert code_metrics(even, ENTRIES, 1)["code_perplexity"].item() == pytest.approx(2 * ENTRIES)


# ---- how they start


def test_fresh_quantizers_use_many_codes():
    """Gumbel: logits that outweigh the noise, so that frames sound apart. k-means: no codeword far from all frames."""
    torch.manual_seed(0)
    frames = torch.randn(4, 200, 32)
    for kind, quantizer_class in QUANTIZERS.items():
        quantizer = quantizer_class(32, 2, 20, shared=True)
        quantizer.reset_parameters()
        perplexity = code_metrics(quantizer(frames).codes, 20, 1)["lowest_group_perplexity"].item()
        assert perplexity > 8, kind
        if kind == "gumbel":
            logits = quantizer.weight_proj(F.gelu(quantizer.hidden(frames))).unflatten(-1, (2, 20))
            assert logits.softmax(-1).amax(-1).mean() > 0.7
