"""What can go wrong in pretraining, how it shows in what is logged, and what to change: a table for each family.

The numbers are of runs that others published and of our own; a check says True where it clearly is so.
"""

import math

from acoustic.training.health import Check, Facts, Family, Memory, outside

# What the paper's base model was trained with: 64 x 1.4 M samples of audio in an update at a peak of 5e-4.
PAPER_UPDATE_SECONDS, PAPER_LEARNING_RATE = 5760, 5e-4

# ---- what to change


def smaller_rate(facts: Facts) -> str:
    if facts.learning_rate >= 4 * PAPER_LEARNING_RATE:
        if facts.objective == "wav2vec2":
            return f"--learning_rate {PAPER_LEARNING_RATE:g} (the paper's)"
        return f"--learning_rate {facts.learning_rate / 10:.2g} (a tenth)"
    return f"--learning_rate {facts.learning_rate / 2:.2g} (half)"


def longer_warmup(facts: Facts) -> str:
    """Twice the updates, or the paper's 8 % where there was none."""
    return f"--warmup_steps {max(2 * facts.warmup_steps, math.ceil(0.08 * facts.max_steps))} (longer)"


def larger_update(facts: Facts) -> str:
    """Four times the audio; what the paper took where a run is near it or beyond."""
    more = 4 * facts.update_seconds
    if facts.objective != "wav2vec2":
        return f"--update_seconds {more:g} (four times the audio)"
    if more > PAPER_UPDATE_SECONDS:
        return f"--update_seconds {max(PAPER_UPDATE_SECONDS, 2 * facts.update_seconds):g}"
    return f"--update_seconds {more:g} (four times the audio; the paper took 1.6 h, {PAPER_UPDATE_SECONDS})"


# ---- the checks


def patience(facts: Facts) -> int:
    """A thousandth of the run, at least 50 updates: cheap to wait for, and a codebook may dip and recover."""
    return facts.of_the_run(0.001, 50, 500)


def codes_collapsed(memory: Memory) -> bool | None:
    return outside(memory.excess_codes, memory.facts.fewest_codes, 2 * memory.facts.fewest_codes)


def say_codes_collapsed(memory: Memory, since: int) -> str:
    facts = memory.facts
    return (
        f"codebook collapse: code perplexity {memory.now['code_perplexity']:.1f} of {facts.num_codes} since update "
        f"{since}; nearly all frames have the same code, so there is nothing left to tell apart and nothing more is "
        f"learned. Start again with {smaller_rate(facts)} and {longer_warmup(facts)}, then {larger_update(facts)}, "
        "--negatives_from utterance, or a larger diversity_loss_weight in --config_overrides"
    )


def loss_at_zero(memory: Memory) -> bool | None:
    """Below .02 nats the target is named with a probability of 98 %: collapsed runs sit at .000 to .0013 (transformers
    #14387, #12934). Released models name 60 to 70 % of the targets (fairseq #2949)."""
    return outside(memory.now.get(memory.family.loss), 0.02, 0.05)


def say_loss_at_zero(memory: Memory, since: int) -> str:
    facts, codes = memory.facts, memory.now.get("code_perplexity")
    used = "" if codes is None else f" (code perplexity {codes:.1f} of {facts.num_codes})"
    return (
        f"contrastive loss at zero: {memory.now['contrastive_loss']:.4f} nats per masked frame since update {since}"
        f"{used}; the task is solved without any idea of the audio, and nothing more is learned. Start again with "
        f"--mask_time_length 20 (nothing to copy from neighbours), --negatives_from utterance, {smaller_rate(facts)}"
    )


def vanished_gradients(memory: Memory) -> bool | None:
    """The smallest norm of a healthy run here was .13, on the plateau at its start; collapsed ones have 1e-18."""
    return outside(memory.gradient, 1e-3, 3e-3)


def say_vanished_gradients(memory: Memory, since: int) -> str:
    facts = memory.facts
    return (
        f"vanished gradients: their norm is {memory.gradient:.1g} since update {since}{healthy_norm(memory)}, so the "
        f"weights hardly move and nothing more is learned. Start again with {smaller_rate(facts)} and "
        f"{longer_warmup(facts)}; with --fp16, try --bf16 instead"
    )


def at_chance(memory: Memory) -> bool | None:
    """By the loss, as with equal vectors accuracy can be anything (fairseq #3661, #3718: stuck at log 101 with .2 to
    .8); by accuracy, as a loss can be below log(101) where equal codes leave fewer negatives."""
    facts, loss = memory.facts, memory.loss
    by_accuracy = outside(memory.mean("accuracy"), 1.5 * facts.chance_accuracy, 2 * facts.chance_accuracy)
    if by_accuracy or loss is None:
        return by_accuracy
    return outside(loss, facts.chance_loss - 0.1, facts.chance_loss - 0.2)


def long_after_warmup(memory: Memory) -> bool:
    """Healthy runs stay at chance for most of their warmup, and small ones for 100 updates more (measured); 300, or a
    twentieth of the run. A run that had left chance needs no such time."""
    grace = memory.facts.of_the_run(0.05, 300, 5000)
    return memory.has_learned or memory.step >= memory.facts.warmup_steps + grace


def say_at_chance(memory: Memory, since: int) -> str:
    facts, loss, accuracy = memory.facts, memory.loss, memory.mean("accuracy")
    seen = [
        *([] if loss is None else [f"contrastive loss {loss:.2f} (chance is {facts.chance_loss:.2f})"]),
        *([] if accuracy is None else [f"accuracy {accuracy:.3f} (chance is {facts.chance_accuracy:.3f})"]),
    ]
    return (
        f"at chance: {', '.join(seen)} since update {since}, {when(memory)}; the run is learning nothing. Start again "
        f"with {smaller_rate(facts)} and {larger_update(facts)}{elsewhere(memory)}"
    )


def elsewhere(memory: Memory) -> str:
    if memory.facts.negatives_from == "batch":
        return ""
    return f"; where sounds are steady within a recording, {negatives_from(memory, 'batch')}"


def negatives_from(memory: Memory, where: str) -> str:
    """How wav2vec 2.0 is told, and how the predictive systems are."""
    if memory.family is WAV2VEC2:
        return f"--negatives_from {where}"
    return f"negatives_from: {where} in --config_overrides"


def when(memory: Memory) -> str:
    return "it had learned before and fell back" if memory.has_learned else "long after its warmup"


def healthy_norm(memory: Memory) -> str:
    """Quoted by others (0.5 to 2) and measured here; of wav2vec 2.0."""
    return " (0.5 to 4 is healthy)" if memory.family is WAV2VEC2 else ""


def exploding(limit: float) -> Check:
    """Beyond `limit`, until it is half of that; not a single spike."""

    def state(memory: Memory) -> bool | None:
        return outside(memory.gradient, limit, limit / 2)

    return Check("exploding_gradients", state, say_exploding_gradients, lambda facts: 20, logs=3)


def say_exploding_gradients(memory: Memory, since: int) -> str:
    facts = memory.facts
    return (
        f"exploding gradients: their norm is {memory.gradient:.3g} since update {since}{healthy_norm(memory)}, so "
        f"updates go far astray. Start again with {smaller_rate(facts)}, {longer_warmup(facts)}, or --max_grad_norm 1"
    )


def dead_group(memory: Memory) -> bool | None:
    """A group at 1.1 gives 98 % of the frames one code; others at 2 or more use theirs."""
    lowest, total = memory.now.get("lowest_group_perplexity"), memory.now.get("code_perplexity")
    others = memory.facts.num_groups - 1
    if lowest is None or total is None or others == 0:
        return None
    return outside(lowest, 1.1, 1.5) if (total - lowest) / others >= 2 else None


def say_dead_group(memory: Memory, since: int) -> str:
    facts, lowest = memory.facts, memory.now["lowest_group_perplexity"]
    return (
        f"dead code group: one of {facts.num_groups} groups has a perplexity of {lowest:.2f} since update {since}, so "
        f"1/{facts.num_groups} of every code says nothing. Start again with a larger diversity_loss_weight in "
        f"--config_overrides (0.1 is the paper's), {smaller_rate(facts)}, or --gumbel_temperature_floor 1"
    )


def rate_too_high(memory: Memory) -> bool | None:
    """The loss .3 nats above its best (batches differ by .1) and accuracy down by a fifth.

    The best is of the codes in use: in healthy runs the loss can rise with their number.
    """
    best = memory.best
    if best is None:
        return None
    risen = outside(memory.loss - best[memory.family.loss], 0.3, 0.15)
    highest = best.get("accuracy", math.nan)
    fallen = outside(memory.mean("accuracy"), 0.8 * highest, 0.9 * highest)
    if risen is False or fallen is False:
        return False
    return True if risen and fallen else None


def say_rate_too_high(memory: Memory, since: int) -> str:
    facts, best = memory.facts, memory.best
    return (
        f"learning rate too high for the batch: since update {since} the contrastive loss is "
        f"{memory.loss:.2f} and accuracy {memory.mean('accuracy'):.2f}, worse than "
        f"{best[memory.family.loss]:.2f} and {best['accuracy']:.2f} at update {best['step']}"
        f"{', with no more codes in use' if facts.num_codes else ''}. {rate_and_cure(facts)}"
    )


def rate_and_cure(facts: Facts) -> str:
    return (
        f"A rate of {facts.learning_rate:.2g} at {facts.update_seconds:g} s of audio per update; wav2vec 2.0's paper "
        f"took {PAPER_LEARNING_RATE:g} at 1.6 h ({PAPER_UPDATE_SECONDS} s). Start again with {smaller_rate(facts)}, "
        f"or {larger_update(facts)}"
    )


def data_bound(memory: Memory) -> bool | None:
    """A fifth of the time is worth a worker; our runs on two cores waited for 0.2 to 1 %."""
    return outside(memory.wait.value, 0.2, 0.1)


def say_data_bound(memory: Memory, since: int) -> str:
    facts = memory.facts
    more = min(max(2 * facts.num_workers, 2), facts.cores)
    if more > facts.num_workers:
        cure = (
            f"Go on with --dataloader_num_workers {more} (it is {facts.num_workers}, of {facts.cores} cores), "
            "--resume_from_checkpoint true and --ignore_data_skip true"
        )
    else:
        cure = (
            f"--dataloader_num_workers {facts.num_workers} takes all {facts.cores} cores already: put the audio on a "
            "local disk, as flac or wav at 16 kHz, which decode several times faster"
        )
    return f"data-bound: {memory.wait.value:.0%} of the time goes into waiting for audio, since update {since}. {cure}"


# ---- predictive systems (wav2vec, vq-wav2vec, CPC)


def say_too_easy(memory: Memory, since: int) -> str:
    return (
        f"contrastive loss at zero: {memory.loss:.4f} nats per target since update {since}; the steps ahead are told "
        "from their negatives without any idea of the audio, and nothing more is learned. Start again with "
        f"{negatives_from(memory, 'utterance')}, and more negatives and steps there (num_negatives, num_steps)"
    )


def say_quantizer_collapsed(memory: Memory, since: int) -> str:
    facts = memory.facts
    return (
        f"codebook collapse: code perplexity {memory.now['code_perplexity']:.1f} of {facts.num_codes} since update "
        f"{since}; nearly all frames have the same code, so there is nothing left to predict and nothing more is "
        f"learned. Start again with {smaller_rate(facts)} and {longer_warmup(facts)}, --gumbel_temperature_floor 1, "
        "or the other quantizer (quantizer_type in --config_overrides)"
    )


def say_quantizer_half_dead(memory: Memory, since: int) -> str:
    facts, lowest = memory.facts, memory.now["lowest_group_perplexity"]
    return (
        f"dead code group: one of {facts.num_groups} groups has a perplexity of {lowest:.2f} since update {since}, so "
        f"1/{facts.num_groups} of every code says nothing. Start again with {smaller_rate(facts)}, "
        "--gumbel_temperature_floor 1, or the other quantizer (quantizer_type in --config_overrides)"
    )


# ---- reconstruction (Mockingjay, Audio ALBERT)


def trivial_loss(memory: Memory) -> float | None:
    """Of who knows nothing but the mean (reconstruction), or the frequencies of the codes."""
    return memory.mean(TRIVIAL[memory.family.loss])


def at_trivial(memory: Memory) -> bool | None:
    """Within 3 % of it, as the median of a window of speech is, which L1 would rather have than its mean; runs that
    learn leave it within their warmup."""
    trivial, loss = trivial_loss(memory), memory.loss
    return None if not trivial or loss is None else outside(loss / trivial, 0.97, 0.945)


def say_at_mean(memory: Memory, since: int) -> str:
    return (
        f"at the mean: a reconstruction loss of {memory.loss:.3f} since update {since}, {when(memory)}; predicting "
        f"nothing but the mean gives {trivial_loss(memory):.3f}, so the run is learning nothing. Start again with "
        f"{smaller_rate(memory.facts)} and {longer_warmup(memory.facts)}; where the audio is noise without "
        "structure in time, reconstruction has nothing to find: try --objective cpc"
    )


def risen_by_share(memory: Memory) -> bool | None:
    """15 % above its best, which batches alone don't do."""
    return None if memory.best is None else outside(memory.loss / memory.best[memory.family.loss], 1.15, 1.07)


def say_risen(memory: Memory, since: int) -> str:
    best = memory.best
    return (
        f"learning rate too high for the batch: since update {since} the loss is {memory.loss:.3f}, worse than "
        f"{best[memory.family.loss]:.3f} at update {best['step']}. {rate_and_cure(memory.facts)}"
    )


# ---- codes (code BERT)


def say_at_frequencies(memory: Memory, since: int) -> str:
    return (
        f"at the frequencies: a loss of {memory.loss:.2f} nats per masked frame since update {since}, {when(memory)}; "
        f"knowing nothing but how frequent each code is gives {trivial_loss(memory):.2f}, so the run is learning "
        f"nothing. Start again with {smaller_rate(memory.facts)} and {longer_warmup(memory.facts)}"
    )


def say_poor_quantizer(memory: Memory, since: int) -> str:
    return (
        f"codebook collapse: the quantizer gives nearly all frames the same code (perplexity "
        f"{memory.now['code_perplexity']:.1f} of {memory.facts.num_codes}, since update {since}), so there is nothing "
        "to predict. Start again with another --quantizer_name_or_path: a vq_wav2vec whose code_perplexity stayed high"
    )


TRIVIAL = {"reconstruction_loss": "mean_predictor_loss", "loss": "unigram_loss"}


# ---- what is checked of whom

COLLAPSED = ("codebook_collapse", "loss_at_zero")
STUCK = ("at_chance", "at_the_mean", "at_the_frequencies")


def long_rise(facts: Facts) -> int:
    """Longer than a hard stretch of the data."""
    return facts.of_the_run(0.05, 100, 2000)


def twice_patience(facts: Facts) -> int:
    return 2 * patience(facts)


def stuck(name: str, state, line) -> Check:
    return Check(name, state, line, twice_patience, collapse=True, explained_by=COLLAPSED, due=long_after_warmup)


def collapsed(name: str, state, line, **options) -> Check:
    return Check(name, state, line, patience, collapse=True, **options)


VANISHED = collapsed("vanished_gradients", vanished_gradients, say_vanished_gradients, logs=3, explained_by=COLLAPSED)
# Healthy norms of wav2vec 2.0 are 0.5 to 4.5 (quoted and measured), of reconstruction and codes 0.1 to 2 (measured).
# At the papers' sizes the predictive systems begin at 60 to 330 (measured) and learn.
EXPLODING, EXPLODING_PREDICTIVE = exploding(20.0), exploding(2000.0)
RATE_TOO_HIGH = Check(
    "learning_rate_too_high", rate_too_high, say_rate_too_high, long_rise, explained_by=(*COLLAPSED, *STUCK)
)
RISEN = Check("learning_rate_too_high", risen_by_share, say_risen, long_rise, explained_by=(*COLLAPSED, *STUCK))
DATA_BOUND = Check("data_bound", data_bound, say_data_bound, lambda facts: 100, logs=8)


def below_chance(memory: Memory) -> float:
    """Half a nat below chance: an accuracy of 5 to 10 % among 100 negatives, which no healthy run gives back."""
    return memory.facts.chance_loss - 0.5


def below_trivial(memory: Memory) -> float | None:
    trivial = trivial_loss(memory)
    return None if trivial is None else 0.9 * trivial


WAV2VEC2 = Family(
    loss="contrastive_loss",
    smoothed=("accuracy", "code_perplexity"),
    learned_below=below_chance,
    checks=(
        collapsed("codebook_collapse", codes_collapsed, say_codes_collapsed),
        collapsed("loss_at_zero", loss_at_zero, say_loss_at_zero, explained_by=COLLAPSED[:1]),
        VANISHED,
        stuck("at_chance", at_chance, say_at_chance),
        EXPLODING,
        Check("dead_code_group", dead_group, say_dead_group, twice_patience, explained_by=COLLAPSED),
        RATE_TOO_HIGH,
        DATA_BOUND,
    ),
)
PREDICTIVE = Family(
    loss="contrastive_loss",
    smoothed=("accuracy", "code_perplexity"),
    learned_below=below_chance,
    checks=(
        collapsed("codebook_collapse", codes_collapsed, say_quantizer_collapsed),
        collapsed("loss_at_zero", loss_at_zero, say_too_easy, explained_by=COLLAPSED[:1]),
        VANISHED,
        stuck("at_chance", at_chance, say_at_chance),
        EXPLODING_PREDICTIVE,
        Check("dead_code_group", dead_group, say_quantizer_half_dead, twice_patience, explained_by=COLLAPSED),
        RATE_TOO_HIGH,
        DATA_BOUND,
    ),
)
RECONSTRUCTION = Family(
    loss="reconstruction_loss",
    smoothed=("mean_predictor_loss",),
    learned_below=below_trivial,
    checks=(VANISHED, stuck("at_the_mean", at_trivial, say_at_mean), EXPLODING, RISEN, DATA_BOUND),
)
CODES = Family(
    loss="loss",
    smoothed=("unigram_loss", "accuracy"),
    learned_below=below_trivial,
    checks=(
        collapsed("codebook_collapse", codes_collapsed, say_poor_quantizer),
        VANISHED,
        stuck("at_the_frequencies", at_trivial, say_at_frequencies),
        EXPLODING,
        RISEN,
        DATA_BOUND,
    ),
)
FAMILIES = {"contrastive": WAV2VEC2, "predictive": PREDICTIVE, "reconstruction": RECONSTRUCTION, "codes": CODES}
