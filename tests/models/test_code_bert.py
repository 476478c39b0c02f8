"""code_bert: RoBERTa on the codes of a vq-wav2vec that stays as it is; masks, long windows, padding, checkpoints."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers

import acoustic.models  # noqa: F401  (the Auto classes)
from acoustic.models.code_bert import (
    LARGEST_VOCABULARY,
    MASK,
    NUM_SPECIAL,
    PAD,
    CodeBertConfig,
    CodeBertForPreTraining,
    CodeBertModel,
    cut,
    put_together,
)
from acoustic.models.masking import draw_span_mask
from acoustic.models.vq_wav2vec import VQWav2VecConfig, VQWav2VecModel
from acoustic.tasks.base import with_random_weights

CODES = {
    "conv_dim": [12, 16, 20],
    "conv_kernel": [20, 8, 4],
    "conv_stride": [10, 4, 4],  # 160 samples a frame, which sees 210
    "num_codevectors_per_group": 7,
    "hidden_size": 16,
    "context_kernel": [2],
}
SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WORDS = NUM_SPECIAL + 7**2
AUTO = (
    transformers.AutoModelForCTC,
    transformers.AutoModelForAudioClassification,
    transformers.AutoModelForAudioFrameClassification,
)
KINDS = pytest.mark.parametrize("kind", ["gumbel", "kmeans"])


def make_quantizer(kind="gumbel", **changed):
    torch.manual_seed(1)
    return VQWav2VecModel(VQWav2VecConfig(**{**CODES, "quantizer_type": kind, **changed}))


def make_model(kind="gumbel", **changed):
    quantizer = make_quantizer(kind)
    torch.manual_seed(0)
    model = CodeBertForPreTraining.from_quantizer(quantizer, {**SMALL, **NO_DROPOUT, **changed})
    with torch.no_grad():
        for parameter in model.parameters():  # all of them matter: no bias that is 0, no logits that are all alike
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_audio(rows=3, samples=4000):
    return torch.randn(rows, samples, generator=torch.Generator().manual_seed(0))


def samples_of(frames):
    return 210 + (frames - 1) * 160


def reader_of(model):
    """What reads the codes, as it is now."""
    return {name: value.clone() for name, value in model.base_model.reader.state_dict().items()}


def train(model, audio, updates=1, **optimizer):
    optimizer = torch.optim.AdamW(model.parameters(), **{"lr": 1e-2, "weight_decay": 0.1, **optimizer})
    for update in range(updates):
        output = model.train()(audio, seed=update)
        (output.loss / output.num_targets).backward()
        optimizer.step()
        optimizer.zero_grad()


# ---- sizes


def test_it_is_roberta_base_with_a_word_for_each_pair_of_codes():
    config = CodeBertConfig(quantizer=VQWav2VecConfig().to_diff_dict())
    assert config.num_words == 2 + 320 * 320 == 102_402
    assert (config.mask_time_prob / config.mask_time_length, config.mask_time_length) == (0.05, 10)
    with torch.device("meta"):
        model = CodeBertForPreTraining(config)
        layers = transformers.RobertaModel(transformers.RobertaConfig()).encoder
    assert model.mask_settings == (0.5, 10, 1)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.code_bert.named_children()}
    vectors = (102_402 + 2048 + 2 + 1 + 2) * 768  # words, positions, the type, LayerNorm
    assert count["transformer"] == vectors + sum(p.numel() for p in layers.parameters())
    quantizer = 512 * 1024 + 1024 + 1024 * 640 + 640 + 320 * 256
    assert count["reader"] == 512 * 10 + 512 * 512 * (8 + 4 + 4 + 4 + 1 + 1 + 1) + 2 * 512 * 8 + quantizer
    head = 768 * 768 + 768 + 2 * 768 + 102_402
    assert sum(p.numel() for p in model.parameters()) == sum(count.values()) + head


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, "hidden_size 30 must be a multiple of num_attention_heads 4"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
        ({"max_frames": 0}, "max_frames must be at least 1"),
        ({"mask_time_length": 0}, "mask_time_length must be at least 1"),
        ({"mask_time_prob": -0.5}, "mask_time_prob must be a share, from 0 to 1, not -0.5"),
        ({"hidden_dropout_prob": 2.0}, "hidden_dropout_prob must be a share"),
        ({"attention_probs_dropout_prob": -1}, "attention_probs_dropout_prob must be a share"),
        ({"hidden_act": "gellu"}, "hidden_act 'gellu': transformers has no such activation"),
        ({"quantizer": {"num_codevector_groups": 4}}, "320 entries in each of 4 groups make 10,485,760,002 words"),
        ({"quantizer": {"num_codevectors_per_group": 500}}, "make 250,002 words; at most 250,000 are possible"),
        ({"quantizer": {"quantizer_type": "lloyd"}}, "quantizer_type must be one of gumbel, kmeans"),
    ],
)
def test_impossible_values_are_one_line(values, words):
    with pytest.raises(ValueError, match=words) as caught:
        CodeBertConfig(**values)
    assert "\n" not in str(caught.value)


def test_the_largest_vocabulary_is_possible():
    config = CodeBertConfig(quantizer={**CODES, "num_codevectors_per_group": 499})
    assert config.num_words == 2 + 499**2 <= LARGEST_VOCABULARY < 2 + 500**2


def test_without_a_quantizer_there_is_no_model():
    for model_class in (CodeBertModel, CodeBertForPreTraining):
        with pytest.raises(ValueError, match="^code_bert needs a quantizer: the config of a vq_wav2vec model$"):
            model_class(CodeBertConfig(**SMALL))


# ---- the words


@KINDS
def test_words_are_the_quantizers_codes(kind):
    model, audio = make_model(kind), make_audio()
    codes = make_quantizer(kind).eval().quantize(audio)
    words, read = model.train().code_bert.read(audio)
    assert torch.equal(read, codes)
    for row in range(3):
        for time in range(codes.shape[1]):
            first, second = codes[row, time].tolist()
            assert words[row, time] == NUM_SPECIAL + 7 * first + second
    assert len(words.unique()) > 5 and words.max() < WORDS == model.config.num_words
    assert {MASK, PAD}.isdisjoint(words.unique().tolist())
    assert torch.equal(model.code_usage(audio).sum(1), torch.full((2,), words.numel()))
    assert model.code_usage(audio).shape == model.codes == (2, 7)


def test_each_combination_of_codes_is_a_word_of_its_own():
    model = make_model()
    codes = torch.cartesian_prod(torch.arange(7), torch.arange(7))[None]
    model.code_bert.reader.forward = lambda *args: codes
    words, _ = model.code_bert.read(torch.zeros(1, 4000))
    assert words.flatten().sort().values.tolist() == list(range(NUM_SPECIAL, WORDS))


def test_half_precision_reads_the_same_codes():
    reader, audio = make_model().code_bert.reader, make_audio(8)
    codes = reader(audio)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reader(audio), codes)
        rounded = reader.quantizer(reader.encoder(audio)).codes
    assert not torch.equal(rounded, codes)  # what it would otherwise read


# ---- what is hidden


def test_eighty_show_the_mask_ten_another_word_ten_their_own():
    model = make_model()
    words = torch.randint(NUM_SPECIAL, WORDS, (200, 500), generator=torch.Generator().manual_seed(0))
    shown, places = model.hide(words, seed=1)
    chosen = torch.zeros_like(words, dtype=torch.bool).scatter_(1, places, True)
    assert chosen.sum() == places.numel() == model.count_targets(200, samples_of(500))
    assert torch.equal(shown[~chosen], words[~chosen])
    number = chosen.sum().item()
    masked, same = shown[chosen] == MASK, shown[chosen] == words[chosen]
    others = shown[chosen][~masked & ~same]
    # Another word is by chance the right one.
    assert masked.sum().item() / number == pytest.approx(0.8, abs=0.01)
    assert same.sum().item() / number == pytest.approx(0.1 + 0.1 / 49, abs=0.01)
    assert len(others) / number == pytest.approx(0.1 * 48 / 49, abs=0.01)
    counts = torch.bincount(others, minlength=WORDS)
    assert not counts[:NUM_SPECIAL].any()
    torch.testing.assert_close(counts[2:] / len(others), torch.full((49,), 1 / 49), rtol=0, atol=0.006)


def test_spans_of_ten_begin_at_one_frame_in_twenty():
    """As many are hidden as if each frame began a span by a throw of its own; most lie in runs of ten and more. (All
    would, if rows weren't brought to the same number.)"""
    model, frames = make_model(), 2000
    _, places = model.hide(torch.full((50, frames), 5), seed=0)
    hidden = torch.zeros(50, frames, dtype=torch.bool).scatter_(1, places, True)
    begins = torch.rand(200, frames + 9, generator=torch.Generator().manual_seed(0)) < 0.05
    expected = F.max_pool1d(begins.float(), 10, stride=1).mean().item()  # .40
    assert hidden.float().mean().item() == pytest.approx(expected, abs=0.01)
    runs = [len(run) for row in hidden for run in "".join(map(str, row.int().tolist())).split("0") if run]
    assert sum(run for run in runs if run >= 10) / sum(runs) > 0.85
    assert max(runs, key=runs.count) == 10


def test_what_is_hidden_follows_the_seed():
    model, audio = make_model().eval(), make_audio()
    words, _ = model.code_bert.read(audio)
    one, again, other = (model.hide(words, seed) for seed in (1, 1, 2))
    assert torch.equal(one[0], again[0]) and torch.equal(one[1], again[1])
    assert not torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])
    losses = [model(audio, seed=seed).loss.item() for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    torch.manual_seed(0)
    drawn = [model(audio).loss.item() for _ in range(2)]
    torch.manual_seed(0)
    assert drawn[0] != drawn[1] and [model(audio).loss.item() for _ in range(2)] == drawn


@pytest.mark.parametrize("values", [{}, {"mask_time_prob": 0.2, "mask_time_length": 3}])
def test_count_targets_is_what_forward_says(values):
    model = make_model(**values)
    for rows, samples in ((1, samples_of(2)), (3, 4000), (2, 9001)):
        output = model(make_audio(rows, samples), seed=0)
        frames = 1 + (samples - 210) // 160
        assert output.num_targets == model.count_targets(rows, samples) and output.num_frames == rows * frames
        _, places = draw_span_mask(rows, frames, *model.mask_settings, torch.Generator().manual_seed(0))
        assert output.num_targets == places.numel()
    assert make_model(mask_time_prob=0.2).count_targets(2, 9000) < make_model().count_targets(2, 9000)


def test_too_short_a_window_is_one_line():
    model, samples = make_model(), samples_of(2) - 1
    assert model.count_targets(3, samples) == model.count_targets(3, 10) == 0
    with pytest.raises(ValueError, match=f"^{samples} samples are too few for two frames$"):
        model(make_audio(2, samples))
    assert model(make_audio(2, samples + 1), seed=0).num_frames == 4


# ---- the loss


@KINDS
def test_loss_and_gradients_are_robertas(kind):
    """`RobertaForMaskedLM` with the same weights on the same hidden words; its loss is the mean."""
    model, audio = make_model(kind).train(), make_audio()
    bert = transformers.RobertaForMaskedLM(model.config.of_transformer()).train()
    bert.roberta.load_state_dict(model.code_bert.transformer.state_dict())
    for part in ("dense", "layer_norm"):
        getattr(bert.lm_head, part).load_state_dict(getattr(model.head, part).state_dict())
    with torch.no_grad():
        bert.lm_head.bias.copy_(model.head.bias)
    words, _ = model.code_bert.read(audio)
    shown, places = model.hide(words, seed=7)
    labels = torch.full_like(words, -100).scatter_(1, places, words.gather(1, places))
    expected = bert(input_ids=shown, labels=labels)
    output = model(audio, seed=7)
    assert output.num_targets == (labels >= 0).sum()
    torch.testing.assert_close(output.loss / output.num_targets, expected.loss)
    right = (expected.logits.argmax(-1) == labels).sum()
    assert output.metrics["accuracy"] == right
    (output.loss / output.num_targets).backward()
    expected.loss.backward()
    gradients = {name: parameter.grad for name, parameter in bert.roberta.named_parameters()}
    for name, parameter in model.code_bert.transformer.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-6)
    for name, parameter in model.head.named_parameters():
        torch.testing.assert_close(parameter.grad, bert.lm_head.get_parameter(name).grad, rtol=1e-3, atol=1e-6)


def test_a_fresh_model_is_at_chance():
    torch.manual_seed(0)
    model = CodeBertForPreTraining.from_quantizer(make_quantizer(), SMALL)
    output = model(make_audio(8, 9000), seed=0)
    assert output.loss.item() / output.num_targets == pytest.approx(math.log(WORDS), rel=0.03)


def test_metrics_are_named_and_equal_a_naive_count():
    model, audio = make_model().eval(), make_audio()
    output = model(audio, seed=0)
    assert tuple(output.metrics) == model.metric_names
    assert not any(value.requires_grad or value.dim() for value in output.metrics.values())
    perplexities = []
    for group in model.code_bert.reader(audio).flatten(0, 1).unbind(1):
        shares = [group.tolist().count(code) / len(group) for code in range(7)]
        perplexities.append(math.exp(-sum(share * math.log(share) for share in shares if share)))
    means = {key: value.item() / output.num_targets for key, value in output.metrics.items()}
    assert means["code_perplexity"] == pytest.approx(sum(perplexities), rel=1e-4)
    assert means["lowest_group_perplexity"] == pytest.approx(min(perplexities), rel=1e-4)


def test_the_unigram_loss_equals_a_naive_count():
    """Of the frequencies before an update; what an evaluation hears doesn't count."""
    model = make_model()
    heard = [0] * WORDS
    for update, training in enumerate((True, False, True, True, False)):
        audio = torch.randn(2, 5000, generator=torch.Generator().manual_seed(update))
        words, _ = model.code_bert.read(audio)
        _, places = model.hide(words, seed=update)
        expected = 0.0
        for row, columns in enumerate(places.tolist()):
            for column in columns:
                expected -= math.log((heard[words[row, column]] + 1) / (sum(heard) + 49))
        output = model.train(training)(audio, seed=update)
        assert output.metrics["unigram_loss"].item() == pytest.approx(expected, rel=1e-5)
        if training:
            for word in words.flatten().tolist():
                heard[word] += 1
        else:  # by now it isn't chance that is compared
            assert output.metrics["unigram_loss"] < 0.9 * output.num_targets * math.log(49)
        assert model.word_counts.tolist() == heard


def test_counts_do_not_stop_at_the_largest_exact_float32():
    model, words = make_model().train(), torch.full((1, 5), 3)
    model.word_counts[3] = 2**24
    model.unigram_loss(words, words[0])
    model.to(torch.bfloat16).unigram_loss(words, words[0])
    assert model.word_counts[3] == 2**24 + 10


# ---- training


def test_it_overfits_a_toy_set():
    """Two windows by heart: far below what the words' frequencies allow."""
    torch.manual_seed(0)
    model = CodeBertForPreTraining.from_quantizer(make_quantizer(), {**SMALL, **NO_DROPOUT})
    audio = make_audio(2, 6000)
    train(model, audio, updates=150, lr=5e-3, weight_decay=0.0)
    output = model.eval()(audio, seed=1000)
    metrics = {key: value.item() / output.num_targets for key, value in output.metrics.items()}
    assert output.loss.item() / output.num_targets < 0.3 * metrics["unigram_loss"]
    assert metrics["accuracy"] > 0.75


@KINDS
def test_every_trained_parameter_has_a_gradient(kind):
    model = make_model(kind).train()
    model(make_audio(), seed=0).loss.backward()
    for name, parameter in model.named_parameters():
        if ".reader." in name:
            assert parameter.grad is None and not parameter.requires_grad
        elif "key.bias" in name:  # the softmax takes out what is the same for all keys
            assert parameter.grad is not None
        else:
            assert parameter.grad is not None and parameter.grad.any(), name


def test_dropout_is_on_in_training_only():
    model, audio = make_model(hidden_dropout_prob=0.1), make_audio()
    assert model.train()(audio, seed=0).loss != model(audio, seed=0).loss
    assert model.eval()(audio, seed=0).loss == model(audio, seed=0).loss


def test_half_precision_stays_near():
    model, audio = make_model().eval(), make_audio()
    exact = model(audio, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(audio, seed=0)
        half.loss.backward()
    assert half.loss.dtype == torch.float32
    assert half.loss.item() == pytest.approx(exact.loss.item(), rel=0.01)
    assert half.metrics["code_perplexity"] == exact.metrics["code_perplexity"]
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def loss_and_gradients(model, audio):
    model.zero_grad()
    loss = model(audio, seed=0).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(mine, expected):
    torch.testing.assert_close(mine[0], expected[0])
    for name, gradient in expected[1].items():
        torch.testing.assert_close(mine[1][name], gradient, rtol=1e-3, atol=1e-4)


def test_compiled_equals_eager():
    model, audio = make_model().train(), make_audio()
    expected = loss_and_gradients(model, audio)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_regions(backend="aot_eager")
    assert_same(loss_and_gradients(model, audio), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # all layers share it
    assert not torch._dynamo.utils.counters["graph_break"]


def test_gradient_checkpointing_changes_nothing():
    model, audio = make_model(hidden_dropout_prob=0.1).train(), make_audio()
    calls = []
    model.code_bert.transformer.encoder.layer[0].attention.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    expected = loss_and_gradients(model, audio)
    assert len(calls) == 1
    model.gradient_checkpointing_enable()
    torch.manual_seed(0)
    assert_same(loss_and_gradients(model, audio), expected)
    assert len(calls) == 3  # once more, in the backward pass


@pytest.mark.parametrize("max_frames", [100, 12, 5])
def test_nothing_waits_for_the_device(max_frames):
    """No operator's output size depends on values, and no value is read; also where 24 frames are cut into parts,
    into even ones or not."""
    model, audio = make_model(max_frames=max_frames).train(), make_audio()
    model(audio, seed=0)  # how many frames are hidden in each row is found out once, on the CPU
    waits = {"aten::nonzero", "aten::_local_scalar_dense", "aten::unique2", "aten::masked_select"}
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(f"aten::{function.__name__.split('.')[0]}")
            return function(*args, **(kwargs or {}))

    with Watch():
        model(audio, seed=1).loss.backward()
    assert "aten::topk" in seen
    assert not waits & set(seen)


# ---- the encoder


@pytest.mark.parametrize(
    ("frames", "sizes"), [(8, [8]), (9, [5, 4]), (15, [8, 7]), (17, [6, 6, 5]), (25, [7, 7, 7, 4])]
)
def test_what_is_longer_is_read_in_equal_parts(frames, sizes):
    encoder = make_model(max_frames=8).code_bert.eval()
    features = torch.randn(2, frames, 32)
    with torch.no_grad():
        together = encoder.contextualize(features, output_hidden_states=True)
        assert together.last_hidden_state.shape == features.shape
        begin = 0
        for size in sizes:
            own = slice(begin, begin + size)
            alone = encoder.contextualize(features[:, own], output_hidden_states=True)
            for mine, other in zip(together.hidden_states, alone.hidden_states, strict=True):
                torch.testing.assert_close(mine[:, own], other, rtol=1e-4, atol=1e-5)
            begin += size
    assert begin == frames


@KINDS
@pytest.mark.parametrize("max_frames", [100, 24, 10, 7])
def test_a_padded_clip_equals_itself_alone(kind, max_frames):
    """Also where it is cut into other parts than the longest clip, or into fewer of them."""
    encoder = make_model(kind, max_frames=max_frames).code_bert.eval()
    lengths = torch.tensor([samples_of(24), samples_of(15) + 7, samples_of(11), samples_of(1)])
    attention_mask = (torch.arange(lengths[0]) < lengths[:, None]).long()
    audio = make_audio(4, int(lengths[0])) * attention_mask
    with torch.no_grad():
        together = encoder(audio, attention_mask, output_hidden_states=True)
        real = encoder._get_feature_vector_attention_mask(24, attention_mask)
        assert real.sum(1).tolist() == encoder._get_feat_extract_output_lengths(lengths).tolist() == [24, 15, 11, 1]
        assert together.last_hidden_state.isfinite().all()
        for row, length in enumerate(lengths.tolist()):
            alone = encoder(audio[row : row + 1, :length], output_hidden_states=True)
            for mine, other in zip(together.hidden_states, alone.hidden_states, strict=True):
                torch.testing.assert_close(mine[row, real[row]], other[0], rtol=1e-4, atol=1e-5)


def test_cut_and_put_together_again():
    features = torch.randn(3, 11, 2, requires_grad=True)
    real = torch.arange(11) < torch.tensor([[11], [6], [0]])
    for mask in (None, real):
        parts, part_mask, places = cut(features, mask, 4)
        assert parts.shape == (9, 4, 2) and part_mask.shape == (9, 4) and part_mask.any(1).all()
        assert part_mask.view(3, 12)[0].sum() == 11
        again, kept = put_together(parts, places), torch.ones_like(real) if mask is None else real
        assert torch.equal(again[kept], features[kept])
        (gradient,) = torch.autograd.grad(again[kept].sum(), features)
        assert torch.equal(gradient, kept[..., None].expand_as(gradient).float())
    sizes = part_mask.sum(1).view(3, 3).tolist()
    assert sizes == [[4, 4, 3], [3, 3, 4], [4, 4, 4]]  # a part that is empty looks at its own padding
    parts, part_mask, places = cut(features[:, :8], None, 4)
    assert part_mask is None and torch.equal(parts[1], features[0, 4:8])
    assert torch.equal(put_together(parts, places), features[:, :8])


def test_hidden_states_are_the_layers_input_and_outputs():
    model, audio = make_model(num_hidden_layers=3), make_audio()
    encoder = model.code_bert.eval()
    outputs = encoder(audio, output_hidden_states=True)
    features = encoder.extract_features(audio)
    assert len(outputs.hidden_states) == 4
    assert {states.shape for states in outputs.hidden_states} == {(3, 24, 32)}
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    assert torch.equal(outputs.hidden_states[0], encoder.transformer.embeddings(inputs_embeds=features))
    assert torch.equal(features, encoder.words.weight[encoder.read(audio)[0]])
    assert encoder(audio).hidden_states is None


def test_time_and_positions_matter():
    encoder = make_model().code_bert.eval()
    features = torch.randn(2, 20, 32)
    with torch.no_grad():
        hidden = encoder.contextualize(features).last_hidden_state
        turned = encoder.contextualize(features.flip(1)).last_hidden_state.flip(1)
        changed = features.clone()
        changed[0, 10] += torch.randn(32)
        reached = (encoder.contextualize(changed).last_hidden_state - hidden).abs().amax(-1)
    assert (hidden - turned).abs().max() > 0.1  # without positions the two were equal
    assert (reached[0] > 0).all() and not reached[1].any()  # both ways in time, within a window


def test_what_a_run_asks_a_model():
    model = make_model()
    assert (model.family, model.normalizes_audio, model.base_model_prefix) == ("codes", False, "code_bert")
    assert model.get_input_embeddings() is None and model.base_model.get_input_embeddings() is None
    assert model.config.model_type == "code_bert" and model.config.inputs_to_logits_ratio == 160


# ---- what reads the codes stays as it is; checkpoints


@KINDS
def test_training_leaves_the_quantizer_bit_for_bit(kind, tmp_path):
    model, audio = make_model(kind), make_audio()
    before, words = reader_of(model), model.code_bert.words.weight.clone()
    original = make_quantizer(kind).state_dict()
    assert all(torch.equal(value, original[name]) for name, value in before.items())
    train(model, audio, updates=3)
    assert not torch.equal(model.code_bert.words.weight, words)
    model.save_pretrained(tmp_path)
    loaded = CodeBertForPreTraining.from_pretrained(tmp_path)
    encoder = transformers.AutoModel.from_pretrained(tmp_path)
    train(loaded, audio, updates=2)
    for other in (model, loaded, encoder):
        after = reader_of(other)
        assert before.keys() == after.keys()
        assert all(torch.equal(value, before[name]) for name, value in after.items())
        assert not any(parameter.requires_grad for parameter in other.base_model.reader.parameters())
        assert all(parameter.requires_grad for parameter in other.base_model.transformer.parameters())


@pytest.mark.parametrize("auto_class", AUTO)
def test_heads_keep_the_quantizer(auto_class, tmp_path):
    """From the checkpoint, after updates, and in the control with random weights, which has nothing else of it."""
    model, audio = make_model(), make_audio()
    train(model, audio)
    before, trained = reader_of(model), model.code_bert.words.weight
    model.save_pretrained(tmp_path)
    name = str(tmp_path)
    config = transformers.AutoConfig.from_pretrained(name)
    random, notes = with_random_weights(auto_class, name, None, config)
    assert any(note.startswith("never trained, so kept from") and "reader" in note for note in notes)
    for head, same in ((auto_class.from_pretrained(name), True), (random, False)):
        assert torch.equal(head.base_model.words.weight, trained) == same
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
        head.train()(audio).logits.square().sum().backward()
        optimizer.step()
        after = reader_of(head)
        assert before.keys() == after.keys()
        assert all(torch.equal(value, before[name]) for name, value in after.items())
        assert not any(parameter.requires_grad for parameter in head.base_model.reader.parameters())
        assert not torch.equal(head.base_model.words.weight, trained)
        assert torch.equal(head.base_model.read(audio)[0], model.code_bert.read(audio)[0])


def test_freezing_the_front_end_changes_nothing():
    model = make_model()
    before = [parameter.requires_grad for parameter in model.parameters()]
    model.code_bert.freeze_feature_encoder()
    assert [parameter.requires_grad for parameter in model.parameters()] == before


@KINDS
def test_checkpoints_are_read_back(kind, tmp_path):
    """With the words that were counted: a run that goes on has the same baseline."""
    model, audio = make_model(kind, max_frames=20, mask_time_prob=0.4), make_audio()
    train(model, audio, updates=2)
    model.eval().save_pretrained(tmp_path)
    again, info = CodeBertForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(again.word_counts, model.word_counts) and again.word_counts.sum() == 2 * 3 * 24
    values = (config.to_dict() for config in (model.config, CodeBertConfig.from_pretrained(tmp_path)))
    mine, read = ({key: value[key] for key in CodeBertConfig().to_dict()} for value in values)
    assert {**mine, "architectures": None} == {**read, "architectures": None}
    before, after = model(audio, seed=0), again.eval()(audio, seed=0)
    assert after.loss == before.loss
    assert after.metrics["unigram_loss"] == before.metrics["unigram_loss"]
    encoder, info = CodeBertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert all(key.startswith(("head.", "word_counts")) for key in info["unexpected_keys"])
    assert torch.equal(encoder.eval()(audio).last_hidden_state, model.code_bert(audio).last_hidden_state)


def test_loaded_in_half_precision_it_reads_the_same_codes(tmp_path):
    model, audio = make_model().eval(), make_audio()
    model.save_pretrained(tmp_path)
    half = CodeBertForPreTraining.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.head.dense.weight.dtype == torch.bfloat16
    assert torch.equal(half.code_bert.read(audio)[0], model.code_bert.read(audio)[0])
    assert half(audio, seed=0).loss.item() == pytest.approx(model(audio, seed=0).loss.item(), rel=0.02)


def test_counts_of_an_earlier_checkpoint_are_read_too(tmp_path):
    """Those were float32."""
    model = make_model()
    model.word_counts = torch.arange(WORDS, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    again = CodeBertForPreTraining.from_pretrained(tmp_path)
    train(again, make_audio())
    assert again.word_counts.sum().item() == sum(range(WORDS)) + 3 * 24
