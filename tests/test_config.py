"""config.yaml, its typed view, and the command line made from it."""

import argparse
import dataclasses
from pathlib import Path

import pytest
import yaml

from lapo.command_line import Parser
from lapo.config import PUBLISHED_STEPS, Config, load_config, parse_with_config, to_dict, validate
from lapo.errors import UserError
from lapo.runs.optim import ramp_schedule, warmup_schedule
from lapo.sources import explanations
from support import LAPO, ROOT

YAML = yaml.safe_load((LAPO / "config.yaml").read_text())
KEYS = YAML.keys() - {"presets"}


def leaves(values: dict, prefix: str = "") -> dict[str, object]:
    """Values of nested dicts by their dotted key."""
    found = {}
    for key, value in values.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def refusal(*arguments: str) -> str:
    """The sentence with which a command line is refused."""
    with pytest.raises(UserError) as error:
        load_config(list(arguments))
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.fixture
def yaml_file(tmp_path):
    """Writes a config file; returns its path as a string."""

    def write(text: str) -> str:
        path = tmp_path / "sweep.yaml"
        path.write_text(text)
        return str(path)

    return write


# ---------------------------------------------------------------- the file and its view


def test_yaml_and_dataclasses_know_the_same_keys():
    def fields(kind: type, prefix: str = "") -> set[str]:
        found = set()
        for field in dataclasses.fields(kind):
            nested = dataclasses.is_dataclass(field.type)
            found |= fields(field.type, f"{prefix}{field.name}.") if nested else {prefix + field.name}
        return found

    assert leaves({key: YAML[key] for key in KEYS}).keys() == fields(Config)


def test_values_are_those_of_the_file():
    assert to_dict(load_config([])) == {key: YAML[key] for key in KEYS}


def test_defaults_are_the_published_numbers():
    """Spot checks against the method's description; the schedules' are in test_compute.py."""
    cfg = load_config([])
    assert (cfg.model.idm_scale, cfg.model.policy_scale, cfg.model.wm_width) == (4, 4, 24)
    assert (cfg.vq.num_codebooks, cfg.vq.num_latents, cfg.vq.num_embs, cfg.vq.emb_dim) == (2, 4, 64, 16)
    assert (cfg.vq.la_dim, cfg.vq.decay, cfg.vq.commitment_cost, cfg.vq.epsilon) == (128, 0.999, 0.05, 1e-5)
    assert (cfg.vq.enabled, cfg.vq.start) == (True, "published")
    assert (cfg.stage1.steps, cfg.stage1.batch_size, cfg.stage1.lr, cfg.stage1.clip_norm) == (
        50_000,
        128,
        3e-4,
        2,
    )
    assert cfg.stage1.save_every == 5_000
    assert (cfg.stage2.steps, cfg.stage2.batch_size, cfg.stage2.lr) == (60_000, 128, 2e-4)
    assert cfg.stage3.steps == 4_000_000
    probe = cfg.probe
    assert (probe.windows, probe.hidden, probe.batch_size, probe.epochs) == (131_072, 128, 128, 3)
    ppo = cfg.ppo
    assert (ppo.num_envs, ppo.rollout_steps, ppo.minibatches, ppo.epochs) == (64, 64, 8, 3)
    assert (ppo.gamma, ppo.gae_lambda, ppo.clip, ppo.clip_norm) == (0.999, 0.95, 0.2, 0.5)
    assert (ppo.entropy_coef, ppo.value_coef, ppo.lr) == (0.0025, 0.5, 1e-2)
    decoder = cfg.decoder
    assert (decoder.hidden, decoder.batch_size, decoder.epochs) == ([192, 128, 64], 512, 3)
    assert (decoder.lr, decoder.label_smoothing) == (1e-3, 0.05)
    assert cfg.data.train_chunks == 80


def test_every_preset_is_valid_and_changes_only_what_it_names():
    assert "demo" in YAML["presets"]
    for name, changes in YAML["presets"].items():
        expected = leaves({key: YAML[key] for key in KEYS}) | leaves(changes)
        assert leaves(to_dict(load_config(["--preset", name]))) == expected


def test_a_configuration_survives_being_written_and_read():
    cfg = load_config(["--preset", "demo", "--decoder.hidden", "7", "--seed", "5"])
    assert validate(yaml.safe_load(yaml.safe_dump(to_dict(cfg)))) == cfg


def test_paths_start_at_the_repository_whatever_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cfg = load_config(["--env", "maze", "--exp", "a", "--seed", "3"])
    assert cfg.run_dir == ROOT / "exp_results" / "a" / "maze" / "seed3"
    assert cfg.game_data == ROOT / "expert_data" / "maze"
    elsewhere = load_config(["--results_dir", str(tmp_path), "--data_dir", "~/frames"])
    assert elsewhere.run_dir == tmp_path / "main" / "bigfish" / "seed0"
    assert elsewhere.game_data == Path.home() / "frames" / "bigfish"


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize("key", leaves({key: YAML[key] for key in sorted(KEYS)}))
def test_every_key_is_an_option(key):
    value = leaves(YAML)[key]
    words = [str(item) for item in value] if isinstance(value, list) else [str(value)]
    assert load_config([f"--{key}", *words]) == load_config([])


def test_options_are_written_with_space_or_equals_and_dash_or_underscore():
    expected = load_config(["--stage1.batch_size", "64"])
    assert expected.stage1.batch_size == 64
    assert load_config(["--stage1.batch_size=64"]) == expected
    assert load_config(["--stage1.batch-size", "64"]) == expected


def test_values_take_the_type_of_their_key():
    cfg = load_config(
        ["--stage1.lr", "3e-4", "--vq.enabled", "false", "--decoder.hidden", "5", "6", "--exp", "17"]
    )
    assert (cfg.stage1.lr, cfg.vq.enabled, cfg.decoder.hidden, cfg.exp) == (3e-4, False, [5, 6], "17")
    assert load_config(["--decoder.hidden", "5"]).decoder.hidden == [5]


def test_numbers_that_yaml_reads_as_text_are_numbers(yaml_file):
    assert load_config(["--config", yaml_file("stage1: {lr: 3e-4}")]).stage1.lr == 3e-4


@pytest.mark.parametrize(
    "word",
    ["1.10", "0010", "1_000", "1e5", "0x1F", "off", "yes", "NO", "True", "2024-01-15", "2024-99-99", "007.5"],
)
def test_names_arrive_as_they_are_written(yaml_file, word):
    """YAML 1.1 would make numbers, booleans and dates of them; in quotes they are the same."""
    for text in (f"exp: {word}", f"exp: '{word}'", f"exp: {word}   # a name"):
        assert load_config(["--config", yaml_file(text)]).exp == word
    assert load_config(["--exp", word]).exp == word
    assert (
        load_config(["--config", yaml_file(f"presets: {{{word}: {{seed: 7}}}}"), "--preset", word]).seed == 7
    )


def test_words_that_yaml_takes_for_true_and_false_are_what_their_key_takes_them_for(yaml_file):
    cfg = load_config(["--config", yaml_file("compile: off\neval: {greedy: yes}\nvq: {enabled: off}")])
    assert (cfg.compile, cfg.eval.greedy, cfg.vq.enabled) == ("off", True, False)
    assert load_config(["--config", yaml_file("compile: on")]).compile == "on"


def test_numbers_are_decimal_whatever_their_zeros(yaml_file):
    cfg = load_config(["--config", yaml_file("seed: 0010\nstage1: {lr: 1e-4, steps: +7, clip_norm: 1_0.5}")])
    assert (cfg.seed, cfg.stage1.lr, cfg.stage1.steps, cfg.stage1.clip_norm) == (10, 1e-4, 7, 10.5)


@pytest.mark.parametrize(("word", "steps"), [("4e6", 4_000_000), ("1.5e3", 1500), ("2.E+1", 20), ("3.0", 3)])
def test_whole_numbers_may_have_an_exponent(yaml_file, word, steps):
    for cfg in (
        load_config(["--stage1.steps", word]),
        load_config(["--config", yaml_file(f"stage1: {{steps: {word}}}")]),
    ):
        assert cfg.stage1.steps == steps
        assert type(cfg.stage1.steps) is int


@pytest.mark.parametrize("value", ["[64, 32]", "64,32", "64, 32", "[ 64,32 ]", "64 32"])
def test_a_list_may_be_written_as_sweeps_write_it(yaml_file, value):
    for arguments in (
        [f"--decoder.hidden={value}"],
        ["--decoder.hidden", *value.split(" ")],
        ["--config", yaml_file(f"decoder: {{hidden: '{value}'}}")],
    ):
        assert load_config(arguments).decoder.hidden == [64, 32]
    assert load_config(["--config", yaml_file("decoder: {hidden: 64}")]).decoder.hidden == [64]


def test_a_group_of_which_nothing_is_left_changes_nothing(yaml_file):
    for empty in (
        "stage1:\n#  lr: 1\n",
        "stage1: null\n",
        "ppo:\n  fc:\n#    hold: 1\n",
        "presets:\n# tiny:\n",
    ):
        assert load_config(["--config", yaml_file(empty + "seed: 3")]) == load_config(["--seed", "3"])
    file = yaml_file("presets:\n  tiny:\n#   seed: 3\n")
    assert load_config(["--config", file, "--preset", "tiny"]) == load_config([])


def test_groups_may_be_merged_and_what_they_change_is_no_repetition(yaml_file):
    text = (
        "stage1: &a {steps: 70, lr: 1e-4}\nstage2: &b {<<: *a, steps: 90}\n"
        "presets: {x: {stage1: {<<: *b, lr: 2e-4}}, y: {stage1: {<<: [*b, *a]}}}"
    )
    cfg = load_config(["--config", yaml_file(text)])
    assert (cfg.stage1.steps, cfg.stage2.steps, cfg.stage2.lr) == (70, 90, 1e-4)
    cfg = load_config(["--config", yaml_file(text), "--preset", "x"])
    assert (cfg.stage1.steps, cfg.stage1.lr) == (90, 2e-4)


@pytest.mark.parametrize("text", ["\ufeffseed: 4\n", "# größer\r\nseed: 4\r\nstage1:\r\n  steps: 9\r\n"])
def test_files_of_other_editors(tmp_path, text):
    file = tmp_path / "sweep.yaml"
    file.write_bytes(text.encode())
    assert load_config(["--config", str(file)]).seed == 4


def test_what_a_run_leaves_is_a_config_file(yaml_file):
    cfg = load_config(["--preset", "demo", "--exp", "0010", "--stage1.lr", "1e-5", "--decoder.hidden", "7"])
    assert load_config(["--config", yaml_file(yaml.safe_dump(to_dict(cfg)))]) == cfg


def test_a_file_changes_only_what_it_names(yaml_file):
    cfg = load_config(["--config", yaml_file("seed: 4\nstage1:\n  steps: 7\nenv: maze\n")])
    expected = leaves(to_dict(load_config([]))) | {"seed": 4, "stage1.steps": 7, "env": "maze"}
    assert leaves(to_dict(cfg)) == expected
    assert load_config(["--config", yaml_file("")]) == load_config([])


def test_later_sources_win(yaml_file):
    file = ["--config", yaml_file("stage1: {steps: 1, log_every: 1, batch_size: 5}\n")]
    demo = YAML["presets"]["demo"]["stage1"]
    cfg = load_config([*file, "--preset", "demo", "--stage1.log_every", "3"])
    assert (cfg.stage1.steps, cfg.stage1.log_every) == (demo["steps"], 3)
    # Order on the command line does not matter.
    assert load_config(["--stage1.log_every", "3", "--preset", "demo", *file]) == cfg


def test_a_file_may_bring_presets(yaml_file):
    file = yaml_file("presets: {tiny: {stage1: {steps: 3}}}")
    assert load_config(["--config", file, "--preset", "tiny"]).stage1.steps == 3
    assert load_config(["--config", file, "--preset", "demo"]).exp == "demo"


def test_of_an_option_given_twice_the_last_counts(yaml_file, tmp_path):
    assert load_config(["--seed", "0", "--env", "maze", "--seed=1"]).seed == 1
    assert load_config(["--decoder.hidden", "5", "6", "--decoder.hidden", "7"]).decoder.hidden == [7]
    assert load_config(["--stage1.log-every", "5", "--stage1.log_every", "6"]).stage1.log_every == 6
    # Files and presets are laid over each other.
    other = tmp_path / "other.yaml"
    other.write_text("env: maze")
    cfg = load_config(["--config", yaml_file("seed: 3"), "--stage1.steps", "5", "--config", str(other)])
    assert (cfg.env, cfg.seed, cfg.stage1.steps) == ("maze", 3, 5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--ppo.fc.hold 200000", "ppo.fc.hold is 200,000, but must come before ppo.fc.peak_at, 200,000 "),
        (
            "--ppo.value_head.peak_at 20000",
            "ppo.value_head.hold is 25,000, but must come before ppo.value",
        ),
        (
            "--ppo.policy_head.peak_at 4000000 --stage3.steps 100",
            "ppo.policy_head.peak_at is 4,000,000, but must come before the end of stage3, 4,000,000 ",
        ),
        (
            "--ppo.policy_head.peak_at 5000000 --stage3.steps 5e6",
            "ppo.policy_head.peak_at is 5,000,000, but must come before the end of stage3, 5,000,000 ",
        ),
        (
            "--stage1.lr_warmup 50000",
            "stage1.lr_warmup is 50,000, but must come before the end of stage1",
        ),
        (
            "--stage2.lr_warmup 60000 --preset demo",
            "stage2.lr_warmup is 60,000, but must come before the end",
        ),
        ("--decoder.start 400000", "decoder.start is 400,000, but must come before decoder.until, 400,000"),
        (
            "--decoder.start 4e6 --decoder.until 5e6",
            "decoder.start is 4,000,000, but must come before the end of stage3, 4,000,000",
        ),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(arguments, sentence):
    assert sentence in refusal(*arguments.split())


@pytest.mark.parametrize(
    "arguments",
    [
        "--stage2.steps 3",  # shrinks to a fraction of a step
        "--stage2.lr_warmup 59999 --stage2.steps 3",
        "--stage1.lr_warmup 60000 --stage1.steps 60001",
        "--ppo.fc.peak_at 3999999 --stage3.steps 64",
        "--ppo.fc.hold 199999",
        "--ppo.fc.peak_at 5e6 --stage3.steps 6e6",
        "--decoder.until 1e9",  # to the end
        "--stage3.steps 1",
    ],
)
def test_a_schedule_that_can_be_rises_to_its_peak_and_falls_within_the_run(arguments):
    cfg = load_config(arguments.split())
    schedules = [
        warmup_schedule(cfg.stage1, PUBLISHED_STEPS["stage1"]),
        warmup_schedule(cfg.stage2, PUBLISHED_STEPS["stage2"]),
        *(
            ramp_schedule(ramp, cfg.stage3.steps, PUBLISHED_STEPS["stage3"])
            for ramp in (cfg.ppo.policy_head, cfg.ppo.value_head, cfg.ppo.fc)
        ),
    ]
    for points in schedules:
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps))


def test_files_on_the_command_line_are_looked_for_in_the_working_directory(monkeypatch, yaml_file, tmp_path):
    yaml_file("seed: 9")
    monkeypatch.chdir(tmp_path)
    assert load_config(["--config", "sweep.yaml"]).seed == 9


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--stage1.lrr 1", "unknown option --stage1.lrr; did you mean --stage1.lr? --help lists all"),
        ("--xyzzy 1", "unknown option --xyzzy; --help lists all"),
        ("--stage1 5", "unknown option --stage1; did you mean --stage1.steps?"),
        ("--sed 5", "unknown option --sed; did you mean --seed?"),
        ("--stage1.batch 5", "unknown option --stage1.batch; did you mean --stage1.batch_size?"),
        ("--stage1.lr.x 5", "unknown option --stage1.lr.x"),
        ("--vq.num_embs 0", "'vq.num_embs' is '0': input should be greater than or equal to 2"),
        ("--vq.decay 1", "'vq.decay' is '1': input should be less than 1"),
        ("--stage1.lr high", "'stage1.lr' is 'high': input should be a valid number"),
        ("--stage1.lr nan", "'stage1.lr' is 'nan': input should be a finite number"),
        ("--stage1.lr inf", "'stage1.lr' is 'inf': input should be a finite number"),
        ("--stage1.lr 0", "'stage1.lr' is '0': input should be greater than 0"),
        ("--stage1.steps 1.5", "'stage1.steps' is '1.5': input should be a valid integer"),
        ("--stage1.steps -1", "'stage1.steps' is '-1': input should be greater than or equal to 1"),
        ("--model.wm_width 3", "'model.wm_width' is '3': input should be a multiple of 2"),
        ("--vq.enabled maybe", "'vq.enabled' is 'maybe': input should be a valid boolean"),
        ("--vq.start best", "'vq.start' is 'best': input should be 'published' or 'data'"),
        ("--device gpu", "'device' is 'gpu'; choose auto, cpu, cuda or cuda:N"),
        (
            "--env a:b:c",
            "'env' is 'a:b:c'; use letters, digits, '.', '_' and '-', a letter or digit first, or m",
        ),
        (
            "--stage3.mode x",
            "'stage3.mode' is 'x': input should be 'bc', 'idm_labelling', 'scratch', 'ilpo', 'offline'",
        ),
        ("--decoder.hidden 8 0", "'decoder.hidden.1' is '0'"),
        ("--decoder.hidden 8 x", "'decoder.hidden.1' is 'x'"),
        ("--device tpu", "'device' is 'tpu'"),
        ("--exp ../elsewhere", "'exp' is '../elsewhere'"),
        ("--env a/b", "'env' is 'a/b'"),
        ("--seed -1", "'seed' is '-1'"),
        ("--seed 2147483648", "'seed' is '2147483648'"),
        ("--seed 1 2", "found '2' where an option was expected"),
        ("--seed 1e999", "'seed' is '1e999': input should be a valid integer"),
        ("--stage1.steps 1e-1", "'stage1.steps' is '1e-1': input should be a valid integer"),
        ("--decoder.hidden 8,,8", "'decoder.hidden.1' is ''"),
        ("--decoder.hidden [8", "'decoder.hidden.0' is '[8'"),
        ("--seed", "argument --seed: expected one argument"),
        ("--seed 1 --exp", "argument --exp: expected one argument"),
        ("bigfish", "found 'bigfish' where an option was expected"),
        ("--preset huge", "unknown preset 'huge'; the presets are: demo"),
        ("--config missing.yaml", "cannot read the config file missing.yaml"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(arguments, sentence):
    assert sentence in refusal(*arguments.split())


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("stage1: {stepz: 5}", "unknown key 'stage1.stepz'; allowed here: steps,"),
        ("stag1: {steps: 5}", "unknown key 'stag1'"),
        ("stage1:\n  lr: [1, 2]", "'stage1.lr' is ['1', '2']"),
        ("stage1:\n  lr: .nan", "'stage1.lr' is '.nan'"),
        ("stage1: 5", "'stage1' is '5'"),
        ("seed:", "'seed' has no value; give it one (the word null in quotes), or leave the line out"),
        ("exp: null", "'exp' has no value"),
        ("~: 5", "unknown key '~'"),
        ("ppo: {fc: {peak: -1}}", "'ppo.fc.peak' is '-1'"),
        ("vq: {num_embs: 0}", "'vq.num_embs' is '0': input should be greater than or equal to 2"),
        ("1: 2", "'1'"),
        ("- 1\n- 2", "must hold `key: value` lines, found a list"),
        ("a: b: c", "line 1 is not valid YAML"),
        ("seed: 1\nstage1: {", "line 2 is not valid YAML"),
        ("seed: yes", "'seed' is 'yes': input should be a valid integer"),
        ("seed: 0x10", "'seed' is '0x10': input should be a valid integer"),
        ("stage1: {steps: 1:30}", "'stage1.steps' is '1:30': input should be a valid integer"),
        ("stage1: {steps: 15e-1}", "'stage1.steps' is '15e-1'"),
        ("stage1: {steps: 1.25e1}", "'stage1.steps' is '1.25e1'"),
        ("wandb: off", "'wandb' is 'off': input should be 'online', 'offline' or 'disabled'"),
        (
            "env: maze\nseed: 1\nenv: ninja",
            "line 3 is not valid YAML: 'env' stands there twice, first in line 1",
        ),
        ("stage1:\n  lr: 1\nseed: 1\n'stage1': {}", "line 4 is not valid YAML: 'stage1' stands there twice"),
        ("ppo: {fc: {hold: 1, hold: 1}}", "'hold' stands there twice, first in line 1; keep one"),
        ("seed: 4\t# the seed", "line 1 is not valid YAML: found character '\\t'"),
        ("exp: \x01", "is not valid YAML: unacceptable character #x0001"),
        ("exp: &a [*a]", "'exp' is"),
        ("exp: !name x", "is not valid YAML: could not determine a constructor for the tag '!name'"),
        ("seed: 1\n---\nseed: 2", "line 2 is not valid YAML"),
        ("presets: 5", "'presets' must hold"),
        ("exp: !!python/object/apply:os.mkdir [executed]", "is not valid YAML"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_the_file(yaml_file, tmp_path, monkeypatch, text, sentence):
    monkeypatch.chdir(tmp_path)
    path = yaml_file(text)
    message = refusal("--config", path)
    assert sentence in message
    assert path in message
    assert not (tmp_path / "executed").exists()


def test_a_preset_that_is_no_group_of_settings_is_named(yaml_file):
    file = yaml_file("presets: {tiny: 5}")
    assert "tiny" in refusal("--config", file, "--preset", "tiny")


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "sweep.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot read the config file" in refusal("--config", str(tmp_path / "sweep.yaml"))
    assert "cannot read the config file" in refusal("--config", str(tmp_path))


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_shows_every_key_with_its_comment_and_value(capsys, monkeypatch, word):
    """The comment is the one in config.yaml, the value the one that files and presets make it."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        load_config(["--preset", "demo", word], description="What the script does.")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for sentence in ("What the script does.", "--config FILE", "--preset NAME"):
        assert sentence in text
    text_of_file = (LAPO / "config.yaml").read_text(encoding="utf-8").partition("\npresets:")[0]
    lines = text_of_file.splitlines()
    for key, value in leaves(to_dict(load_config(["--preset", "demo"]))).items():
        name = key.split(".")[-1]
        comments = [line.partition("#")[2].strip() for line in lines if line.strip().startswith(f"{name}:")]
        assert all(comments), key
        shown = (
            f"{','.join(map(str, value))} [N ...]".strip()
            if isinstance(value, list)
            else str(value).lower() or '""'
        )
        found = text.partition(f"--{key} {shown.strip()} ")[2]
        assert found.startswith(tuple(comments)), key


def test_a_comment_belongs_to_the_key_of_its_line(tmp_path):
    (tmp_path / "x.yaml").write_text(
        "# head\na: 1  # of a\nb:  # of b\n  c: [1, 2]  # of c\n  d:\n    e: x\n  f: 1 # 100 %\n"
    )
    expected = {"a": "of a", "b": "of b", "b.c": "of c", "b.d": "", "b.d.e": "", "b.f": "100 %"}
    assert explanations(tmp_path / "x.yaml") == expected


def test_the_values_of_a_script_s_own_options_and_of_the_config_are_told_apart():
    parser = Parser("A script.")
    parser.add_argument("--json", default="none")
    parser.add_argument("--teacher", dest="expert.teacher", default=argparse.SUPPRESS)
    args, cfg = parse_with_config(parser, ["--json=a-b", "--teacher", "planner", "--stage1.log-every", "3"])
    assert (args.json, cfg.expert.teacher, cfg.stage1.log_every) == ("a-b", "planner", 3)
