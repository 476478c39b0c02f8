"""Command line over YAML over defaults; a mistake is one line that names the key; every option says what it does."""

import dataclasses
import re

import pytest
import torch

import run_finetune
import run_pretrain
from acoustic import config
from acoustic.config import FINETUNE, PRETRAIN, REPLACED, Source, parse_finetuning, parse_pretraining
from acoustic.console import UserError, one_line_errors


@pytest.fixture
def base(tmp_path) -> list[str]:
    return ["--dataset_name", "audio", "--output_dir", str(tmp_path / "out")]


@pytest.fixture
def fine(base) -> list[str]:
    return [*base, "--model_name_or_path", "somewhere"]


@pytest.fixture
def recipe(tmp_path):
    def write(text: str | bytes) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


# ---- what wins


def test_command_line_over_yaml_over_defaults(recipe, tmp_path):
    path = recipe(f"dataset_name: there\noutput_dir: {tmp_path}/out\nmask_time_prob: 0.5\nmax_steps: 7\nseed: 1\n")
    _, data, args = parse_pretraining([path, "--max_steps", "9", "--seed=2"])
    assert (data.dataset_name, args.mask_time_prob, args.max_steps, args.seed) == ("there", 0.5, 9, 2)
    assert (args.mask_time_length, data.max_duration_in_seconds, args.learning_rate) == (None, 15.6, 5e-4)
    assert set(args.given) == {"dataset_name", "output_dir", "mask_time_prob", "max_steps", "seed"}


def test_values_of_every_type_come_through_yaml(recipe, tmp_path):
    path = recipe(
        f"dataset_name: a\noutput_dir: {tmp_path}/out\nmodel_name_or_path: m\ntask: ctc\nlearning_rate: 1e-4\n"
        "streaming: yes\nlogging_first_step: false\ntest_split_name: [test, shifted]\neval_strategy: no\n"
        "config_overrides:\n  conv_dim: [8, 8]\n  layer_norm_eps: 1e-6\n  layerdrop: 0.0\n  hidden_act: no\n"
    )
    model, data, args = parse_finetuning([path])
    assert args.learning_rate == 1e-4 and args.task == "ctc" and args.eval_strategy == "no"
    assert data.streaming is True and args.logging_first_step is False
    assert data.test_split_name == ["test", "shifted"]
    assert model.config_overrides == {
        "conv_dim": [8, 8],
        "layer_norm_eps": 1e-6,
        "layerdrop": 0.0,
        "hidden_act": "no",
    }


def test_config_overrides_on_the_command_line(base):
    model, *_ = parse_pretraining([*base, "--config_overrides", '{"hidden_size": 32}'])
    assert model.config_overrides == {"hidden_size": 32}
    assert parse_pretraining(base)[0].config_overrides == {}


def test_hyphens_are_as_good_as_underscores(base):
    assert parse_pretraining([*base, "--max-steps", "5"])[2].max_steps == 5


def test_each_script_has_its_own_defaults(base, fine):
    _, _, pretraining = parse_pretraining(base)
    _, data, finetuning = parse_finetuning(fine)
    assert (pretraining.learning_rate, finetuning.learning_rate) == (5e-4, 5e-5)
    assert (pretraining.adam_beta2, pretraining.adam_epsilon, pretraining.weight_decay) == (0.98, 1e-6, 0.01)
    assert finetuning.tri_stage and data.max_duration_in_seconds == 20
    assert not parse_finetuning([*fine, "--lr_scheduler_type", "linear"])[2].tri_stage


# ---- mistakes


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("mask_time_probability", "mask_time_prob"),
        ("dataset", "dataset_name"),
        ("lerning_rate", "learning_rate"),
        ("batch_second", "batch_seconds"),
        ("config_override", "config_overrides"),
    ],
)
def test_an_unknown_key_names_the_nearest(base, recipe, wrong, nearest):
    for argv in ([*base, f"--{wrong}", "1"], [*base, f"--{wrong}=1"], [recipe(f"{wrong}: 1\n"), *base]):
        with pytest.raises(UserError, match=f"unknown option '{wrong}'.*did you mean '{nearest}'"):
            parse_pretraining(argv)


def test_an_option_of_the_other_script_is_unknown(base, fine):
    with pytest.raises(UserError, match="unknown option 'text_column_name'"):
        parse_pretraining([*base, "--text_column_name", "text"])
    with pytest.raises(UserError, match="unknown option 'mask_time_length'"):
        parse_finetuning([*fine, "--mask_time_length", "10"])


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("max_steps", "many", "int"),
        ("learning_rate", "fast", "float"),
        ("streaming", "perhaps", "perhaps"),
        ("objective", "bert", "invalid choice"),
        ("negatives_from", "space", "invalid choice"),
        ("eval_strategy", "sometimes", "sometimes"),
    ],
)
def test_a_wrong_type_names_the_key(base, recipe, key, value, words):
    for argv in ([*base, f"--{key}", value], [recipe(f"{key}: {value}\n"), *base]):
        with pytest.raises(UserError, match=f"{key}.*{words}|{words}.*steps"):
            parse_pretraining(argv)


def test_a_missing_value_names_the_key(base):
    with pytest.raises(UserError, match="max_steps: expected one argument"):
        parse_pretraining([*base, "--max_steps"])


def test_a_stray_word(base):
    with pytest.raises(UserError, match="'recipe.yaml' is no option; write --key value"):
        parse_pretraining([*base, "recipe.yaml"])


IMPOSSIBLE = {
    "min_duration_in_seconds": ["--min_duration_in_seconds", "0.05"],
    "max_duration_in_seconds": ["--min_duration_in_seconds", "3", "--max_duration_in_seconds", "5"],
    "batch_seconds": ["--batch_seconds", "8"],
    "validation_split_percentage": ["--validation_split_percentage", "100"],
    "validation_split_percentage ": ["--validation_split_percentage", "-1"],
    "eval_strategy": ["--eval_strategy", "epoch"],
    "save_strategy": ["--save_strategy", "epoch"],
    "mask_time_prob": ["--mask_time_prob", "0"],
    "mask_time_prob ": ["--mask_time_prob", "1"],
    "mask_time_length": ["--mask_time_length", "0"],
    "feature_grad_mult": ["--feature_grad_mult", "-0.1"],
    "feature_penalty_weight": ["--feature_penalty_weight", "-1"],
    "gumbel_temperature_floor": ["--gumbel_temperature_floor", "3"],
    "config_overrides": ["--config_overrides", "{oops"],
    "config_overrides ": ["--config_overrides", "[1]"],
    "max_skipped_fraction": ["--max_skipped_fraction", "1.01"],
    "max_skipped_fraction ": ["--max_skipped_fraction", "-0.1"],
}


@pytest.mark.parametrize("key", IMPOSSIBLE)
def test_impossible_combinations(base, key):
    with pytest.raises(UserError, match=key.strip()):
        parse_pretraining([*base, *IMPOSSIBLE[key]])


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ([], None),
        (["--torch_compile"], {}),
        (["--torch_compile", "--torch_compile_mode", "max-autotune"], {"mode": "max-autotune"}),
        (["--torch_compile_backend", "aot_eager"], {"backend": "aot_eager"}),
    ],
)
def test_the_model_compiles_its_own_regions(base, words, options):
    args = parse_pretraining([*base, *words])[2]
    assert args.compile_options == options
    assert not args.torch_compile  # or transformers would compile the whole model as well


def test_bfloat16_needs_no_second_option_on_a_cpu(base):
    assert parse_pretraining(base)[2].bf16 is torch.cuda.is_available()
    args = parse_pretraining([*base, "--bf16"])[2]
    assert args.bf16 and args.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert not parse_pretraining([*base, "--bf16", "false"])[2].bf16


def test_impossible_combinations_of_finetuning(base, fine):
    with pytest.raises(UserError, match="model_name_or_path: which pretrained model"):
        parse_finetuning(base)
    with pytest.raises(UserError, match="labels_per_class: task ctc has no classes"):
        parse_finetuning([*fine, "--task", "ctc", "--labels_per_class", "3"])


@pytest.mark.parametrize("key", ["dataset_name", "output_dir"])
def test_what_every_run_needs(base, key):
    index = base.index(f"--{key}")
    with pytest.raises(UserError, match=f"^{key}: "):
        parse_pretraining(base[:index] + base[index + 2 :] if key == "dataset_name" else [*base, "--output_dir="])


@pytest.mark.parametrize("key", REPLACED)
def test_options_that_would_do_nothing_are_refused(base, key):
    value = {"auto_find_batch_size": "true", "train_sampling_strategy": "random"}.get(key, "1")
    with pytest.raises(UserError, match=f"^{key}: {re.escape(REPLACED[key])}"):
        parse_pretraining([*base, f"--{key}", value])


# ---- several data sets


def test_one_name_is_a_mix_of_one(base):
    _, data, _ = parse_pretraining(base)
    assert data.mix == [Source("audio")] and data.max_skipped_fraction == 0.1


def test_a_mix_from_yaml_and_from_json(recipe, tmp_path):
    path = recipe(
        f"output_dir: {tmp_path}/out\ndataset_name:\n- here\n- {{name: there, weight: 2.5, split: dev}}\n"
        "- {name: hub/it, config: de, audio_column: sound, streaming: true}\n"
    )
    _, data, args = parse_pretraining([path])
    expected = [
        Source("here", 1.0),
        Source("there", 2.5, split="dev"),
        Source("hub/it", config="de", audio_column="sound", streaming=True),
    ]
    assert data.mix == expected
    assert parse_pretraining(["--dataset_name", args.given["dataset_name"], "--output_dir", "o"])[1].mix == expected
    assert parse_pretraining([path, "--dataset_name", '["a", "b"]'])[1].mix == [Source("a"), Source("b")]


@pytest.mark.parametrize("name", ["[ab]*.wav", "[0-9]/*.flac", "[!x]*", "[ab]"])
def test_a_glob_that_begins_with_a_bracket_is_no_list(name):
    assert parse_pretraining(["--dataset_name", name, "--output_dir", "o"])[1].mix == [Source(name)]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('["a", "b"', "a list of names"),
        ('["a", 3]', "a list of names"),
        ('["a", ["b"]]', "a list of names"),
        ('[{"name": "a", "wieght": 2}]', "unknown option 'wieght'.*did you mean 'weight'"),
        ('[{"weight": 2}]', "each entry needs a name"),
        ('[{"name": "", "weight": 2}]', "each entry needs a name"),
        ('["a", ""]', "each entry needs a name"),
        ('[{"name": "a", "weight": 0}]', "a weight above 0"),
        ('[{"name": "a", "weight": -1}]', "a weight above 0"),
        ('[{"name": "a", "weight": "much"}]', "a weight above 0"),
        ('[{"name": "a", "weight": NaN}]', "a weight above 0"),
        ('[{"name": "a", "weight": null}]', "a weight above 0"),
        ('[{"name": ["a"]}]', "each entry needs a name"),
    ],
)
def test_a_mix_that_is_none(value, message):
    with pytest.raises(UserError, match=message) as error:
        parse_pretraining(["--dataset_name", value, "--output_dir", "o"])
    assert "dataset_name" in str(error.value)


def test_an_empty_list_in_yaml(recipe):
    with pytest.raises(UserError, match="dataset_name"):
        parse_pretraining([recipe("dataset_name: []\n"), "--output_dir", "o"])


def test_a_mix_is_for_pretraining(fine):
    with pytest.raises(UserError, match="dataset_name: a mix of data sets is for pretraining"):
        parse_finetuning([*fine, "--dataset_name", '["a", "b"]'])


# ---- recipes that are none


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2\nb: }", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        ("- dataset_name\n- output_dir\n", "a recipe is a mapping"),
        ("[]", "a recipe is a mapping"),
        ("just words", "a recipe is a mapping"),
        ("max_steps:\n", "max_steps has no value in .*recipe.yaml; leave the line out"),
        ("3: 4\n", "unknown option '3'"),
    ],
)
def test_broken_recipes(base, recipe, text, message):
    with pytest.raises(UserError, match=message):
        parse_pretraining([recipe(text), *base])


def test_an_empty_recipe_changes_nothing(base, recipe):
    assert parse_pretraining([recipe("# nothing yet\n"), *base])[2].max_steps == -1


def test_a_missing_recipe(base, tmp_path):
    for path in (str(tmp_path / "none.yaml"), str(tmp_path)):
        with pytest.raises(UserError, match="there is no recipe"):
            parse_pretraining([path, *base])


# ---- help


def own_options(dataclasses_) -> set[str]:
    return {
        name
        for cls in dataclasses_
        for base_class in cls.__mro__
        if base_class.__module__ == config.__name__
        for name in base_class.__annotations__
    }


@pytest.mark.parametrize(("script", "dataclasses_"), [(run_pretrain, PRETRAIN), (run_finetune, FINETUNE)])
def test_help_shows_every_option_of_ours_in_groups(script, dataclasses_, capsys):
    with pytest.raises(SystemExit) as left, one_line_errors():
        script.main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    names = own_options(dataclasses_)
    assert len(names) > 25
    fields = {field.name: field for cls in dataclasses_ for field in dataclasses.fields(cls)}
    for name in names:
        assert re.search(rf"--{name}\b", shown), name
        text = fields[name].metadata["help"].replace("%%", "%")
        assert len(text) > 10, name
        assert " ".join(text.split()[:4]) in " ".join(shown.split()), name
    for cls in dataclasses_:
        assert f"{cls.__doc__.splitlines()[0]}:" in shown


@pytest.mark.parametrize("dataclasses_", [PRETRAIN, FINETUNE])
def test_options_with_a_dimension_say_their_unit(dataclasses_):
    units = {"seconds": "second", "percentage": "percent", "steps": "update", "duration": "second"}
    fields = {field.name: field for cls in dataclasses_ for field in dataclasses.fields(cls)}
    checked = 0
    for name in own_options(dataclasses_):
        for part, unit in units.items():
            if part in name.split("_") and name != "logging_first_step":
                checked += 1
                assert unit in fields[name].metadata["help"], name
    assert checked >= 6


def test_no_percent_sign_breaks_the_help(capsys):
    assert config.option(1, "5 % of it").metadata["help"] == "5 %% of it"


# ---- how a mistake is shown


def test_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as left, one_line_errors():
        raise UserError("what\n  and where")
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: what and where\n"


def test_other_processes_leave_without_a_word(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as left, one_line_errors():
        raise UserError("once is enough")
    captured = capsys.readouterr()
    assert left.value.code == 2 and not captured.err and not captured.out


def test_what_is_not_the_users_mistake_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), one_line_errors():
        1 / 0  # noqa: B018


# ---- objectives

SECTIONS = """
learning_rate: 1e-3
objectives:
  wav2vec2: {negatives_from: batch, config_overrides: {hidden_size: 32}}
  cpc: {learning_rate: 2e-3, config_overrides: {hidden_size: 16}}
"""


def test_a_recipe_has_a_section_for_each_objective(base, recipe):
    path = recipe(SECTIONS)
    model, _, args = parse_pretraining([path, *base])
    assert (model.config_overrides, args.negatives_from, args.learning_rate) == ({"hidden_size": 32}, "batch", 1e-3)
    for words in (["--objective", "cpc"], ["--objective=cpc"]):
        model, _, args = parse_pretraining([path, *base, *words])
        assert (model.config_overrides, args.objective, args.learning_rate) == ({"hidden_size": 16}, "cpc", 2e-3)
    assert parse_pretraining([path, *base, "--objective", "cpc", "--learning_rate", "1"])[2].learning_rate == 1.0
    path = recipe("objective: cpc\n" + SECTIONS)
    assert parse_pretraining([path, *base])[2].learning_rate == 2e-3


@pytest.mark.parametrize(
    "text, message",
    [
        (SECTIONS, "has no section for objective mockingjay; it has wav2vec2, cpc"),
        ("objectives: [cpc]", "objectives: a mapping of objectives"),
        ("objectives: {cpc: 3}", "cpc needs a mapping"),
        ("objectives: {cpd: {}}", "did you mean 'cpc'"),
        ("objectives: {mockingjay: {max_step: 3}}", "did you mean 'max_steps'"),
    ],
)
def test_sections_that_can_not_be(base, recipe, text, message):
    with pytest.raises(UserError, match=message):
        parse_pretraining([recipe(text), *base, "--objective", "mockingjay"])


def test_options_of_another_objective(base, recipe):
    """On the command line a mistake; in a recipe that is run for another objective, said and left out."""
    with pytest.raises(UserError, match="negatives_from: objective cpc has no such setting; wav2vec2 does"):
        parse_pretraining([*base, "--objective", "cpc", "--negatives_from", "batch"])
    path = recipe("negatives_from: batch\nlearning_rate: 1e-3")
    assert parse_pretraining([path, *base, "--objective", "cpc"])[2].left_out == ["negatives_from"]
    assert parse_pretraining([path, *base])[2].left_out == []


def test_code_bert_needs_a_quantizer(base):
    with pytest.raises(UserError, match="quantizer_name_or_path: code_bert"):
        parse_pretraining([*base, "--objective", "code_bert"])
    parse_pretraining([*base, "--objective", "code_bert", "--quantizer_name_or_path", "codes"])
    parse_pretraining([*base, "--objective", "code_bert", "--model_name_or_path", "earlier"])


def test_a_code_bert_that_is_continued_has_its_quantizer(base, recipe):
    continued = [*base, "--objective", "code_bert", "--model_name_or_path", "earlier"]
    with pytest.raises(UserError, match="'earlier' goes on with the codes that it learned"):
        parse_pretraining([*continued, "--quantizer_name_or_path", "codes"])
    assert parse_pretraining([recipe("quantizer_name_or_path: codes\n"), *continued])[2].quantizer_name_or_path is None
