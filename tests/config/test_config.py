"""Configuration: merging of files, overrides, one-line errors, help, JSON schema, and reading back what was written."""

import json
import re
from itertools import pairwise
from pathlib import Path

import jsonschema
import pytest
import tomli

from titan_moe.config.checks import without_effect
from titan_moe.config.describe import json_schema, options_help, to_toml
from titan_moe.config.load import CONFIG_DIR, FINETUNE, all_keys, load_config
from titan_moe.errors import UserError
from torchtitan_ext.terms import REGISTRY


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_extends_merges_key_by_key_and_later_wins(tmp_path: Path) -> None:
    write(tmp_path / "a.toml", "[model]\ndim = 64\nlayers = 2\n[model.moe]\nexperts = 4")
    write(tmp_path / "b.toml", "[model]\ndim = 128\n[optimizer]\nlr = 1e-3")
    child = write(tmp_path / "c.toml", 'extends = ["a.toml", "b.toml"]\n[model.moe]\ntop_k = 1')
    config = load_config(child, ["--model.layers=5", "--optimizer.lr", "2e-3"])
    assert (config.model.dim, config.model.layers, config.optimizer.lr) == (128, 5, 2e-3)
    assert (config.model.moe.experts, config.model.moe.top_k) == (4, 1)
    assert config.job.name == "c"


def test_a_file_anywhere_may_extend_a_shipped_one(tmp_path: Path) -> None:
    child = write(tmp_path / "mine.toml", 'extends = "debug.toml"\n[model]\ndim = 128')
    assert load_config(child).model.moe.experts == 16


def test_overrides_are_read_by_the_type_of_their_key() -> None:
    config = load_config(
        "debug",
        [
            "--job.name=007",
            "--regularizers.measure=lb,z",
            '--data.corpus=["README.md", "docs"]',
            "--compile.enable=true",
        ],
    )
    assert config.job.name == "007"
    assert config.regularizers.measure == ["lb", "z"]
    assert config.data.corpus == ["README.md", "docs"]
    assert config.compile.enable is True
    assert load_config("debug", ["--data.corpus=some/path"]).data.corpus == "some/path"


SHIPPED = sorted(path for path in CONFIG_DIR.glob("*.toml") if not path.stem.startswith(FINETUNE))
FILES = {
    "[model]\ndimm = 3": r"bad\.toml: unknown key model\.dimm; did you mean model\.dim\?",
    "[modle]\ndim = 3": r"bad\.toml: unknown key modle; did you mean",
    "[model]\ndim = 'x'": r"bad\.toml: model\.dim = 'x': .*integer",
    "[model]\ndim = 0": r"bad\.toml: model\.dim = 0: .*greater",
    "[model]\ndim = true": r"bad\.toml: model\.dim = True: .*integer",
    "[model]\nqk_norm = 1": r"bad\.toml: model\.qk_norm = 1: .*bool",
    "[model.moe]\nscore = 'max'": r"bad\.toml: model\.moe\.score = 'max': .*'softmax' or 'sigmoid'",
    "[model.moe]\nexperts = 4\ntop_k = 5": r"bad\.toml: model\.moe\.top_k = 5 is more than model\.moe\.experts = 4",
    "[model]\nheads = 3": r"bad\.toml: model\.heads = 3 does not divide model\.dim = 256",
    "[model]\nkv_heads = 3": r"model\.kv_heads = 3 does not divide",
    "[model]\nhead_dim = 15": r"even head width",
    "[model]\nqk_norm = 'all'": r"bad\.toml: model\.qk_norm = 'all': .*bool",
    "[model]\nrope_fraction = 0.3\nhead_dim = 10": r"model\.rope_fraction = 0\.3: .* a head of 10 is 3; choose",
    "[model]\nrope_fraction = 0.0": r"model\.rope_fraction = 0\.0: .*greater",
    "[model.moe]\ndense_hidden_dim = 8": r"dense_hidden_dim = 8: the model has no dense layer",
    "[model.moe]\nshared_gate = true": r"shared_gate: the model has no shared expert",
    "[training]\nbatch_size = 6\nmicrobatch_size = 4": r"training\.batch_size = 6 is not a multiple",
    "[training]\nseq_len = 1": r"training\.seq_len = 1",
    "[regularizers]\nsp.weight = -1.0": r"regularizers\.sp\.weight = -1\.0",
    "[regularizers]\nsp.weight = nan": r"regularizers\.sp\.weight",
    "[regularizers]\nmeasure = ['xy']": r"regularizers\.measure: no term 'xy'",
    "[regularizers]\ncustom.mine = 1.0": r"unknown key regularizers\.mine.*needs its module in extensions\.modules",
    "[regularizers.cp]\nweight = 1.0\n[model]\nlayers = 1": r"cp couples neighbouring MoE layers",
    "[regularizers.sp]\nweight = 1.0\n[model.moe]\ntop_k = 1": r"sp compares the experts of a token",
    "[regularizers.o]\nweight = 1.0\n[model.moe]\ntop_k = 1": r"o compares the experts of a token",
    "[regularizers]\nsp.weight = 0\nerc.weight = 1.0\n[model.moe]\ntop_k = 1\nexperts = 1": r"erc compares experts",
    "[regularizers.sp]\nweight = 1.0\nsketch_dim = 7": r"sp\.sketch_dim = 7: .*multiple of 2",
    "[regularizers.sp]\nabove_chance = true\nmethod = 'sketch'\nweight = 1.0": r"sp\.above_chance: a sketch does not give",
    "[regularizers.cp]\nsource = 'transition'\nform = 'log'\nweight = 1.0": r"cp\.form: 'log' takes each token's mass",
    "[checkpoint]\nupcycle_path = 'a'\nload_path = 'b'": r"checkpoint\.upcycle_path: weights come from there or from",
    "[checkpoint]\nupcycle_path = 'a'\n[model.moe]\nshared_experts = 1": r"upcycle_path: .*shared_experts",
    "[regularizers.o]\nvariant = 'mine'": r"o\.variant = 'mine': .*'paper' or 'code'",
    "[regularizers.lb]\nwarmup_steps = -1": r"lb\.warmup_steps = -1",
    "[model.moe]\nfirst_dense_layers = 4": r"the model has no MoE layer, but lb",
    "[model.moe]\nfirst_dense_layers = 9": r"first_dense_layers = 9 is more than",
    "[parallelism]\nep = 2": r"parallelism\.ep = 2 must divide dp_shard \* cp = 1",
    "[parallelism]\ndp_shard = 4": r"parallelism\.dp_shard: .*= 4, but there are 1 processes; use NPROC=4",
    "[parallelism]\npp_schedule = 'zigzag'": r"pp_schedule = 'zigzag': .*'1F1B'",
    "[float8]\nenable = true\n[training]\ndtype = 'float32'": r"float8\.enable: float8 needs .*'bfloat16', not 'float32'",
    "[float8]\nenable = true\n[training]\ndtype = 'bfloat16'\n[model]\ndim = 40": r"multiples of 16 .* model\.dim is 40",
    "[float8]\nrecipe = 'mx'": r"float8\.recipe = 'mx': .*'tensorwise'",
    "[job]\nname = 'a/b'": r"job\.name = 'a/b'",
    "[metrics]\ntrackers = ['nobody']": r"registers a tracker 'nobody'",
    "[extensions]\nmodules = ['some_module']": r"bad\.toml: extensions\.modules names 'some_module'.*give --trust",
    "extends = 'missing.toml'": r"bad\.toml: extends: no file .*missing\.toml",
    "extends = 3": r"bad\.toml: extends: must be",
    "extends = 'bad.toml'": r"circle",
    "[model\n": r"bad\.toml: not valid TOML",
    "model = 3": r"bad\.toml: model = 3",
    "extensions = 3": r"bad\.toml: extensions = 3",
    "extensions.modules = 3": r"bad\.toml: extensions\.modules = 3",
}


@pytest.mark.parametrize("text", list(FILES))
def test_a_mistake_in_a_file_is_one_line_that_names_file_and_key(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=FILES[text]) as caught:
        load_config(write(tmp_path / "bad.toml", text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--training.stepz=3"], r"command line: unknown key training\.stepz; did you mean training\.steps\?"),
        (["--steps=3"], r"unknown option --steps; did you mean --training\.steps\?"),
        (["--training.lr=3"], r"unknown key training\.lr; did you mean optimizer\.lr\?"),
        (["--moe.top_k=3"], r"command line: unknown key moe\.top_k; did you mean model\.moe\.top_k\?"),
        (["--training.steps"], r"--training\.steps needs a value"),
        (["train"], r"'train' is not an option"),
        (["--training.steps=3.5"], r"command line: training\.steps = 3\.5"),
        (["--model.dim.x=3"], r"command line: --model\.dim\.x: 'dim' is not a table"),
        (["--job.seed=-1"], r"command line: job\.seed = -1"),
    ],
)
def test_a_wrong_override_names_the_nearest_key(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config("debug", words)


def test_unknown_configuration_and_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'medium'"):
        load_config("medum")
    (tmp_path / "junk.toml").write_bytes(b"\xff\x00")
    with pytest.raises(UserError, match=r"junk\.toml: can't be read"):
        load_config(str(tmp_path / "junk.toml"))


WORLDS = [
    (
        6,
        ["dp_replicate=4"],
        r"6 processes are not a multiple of pp \* dp_replicate \* cp \* tp = 4; 1, 2, 3, 6 would be",
    ),
    (4, ["dp_shard=3"], r"dp_shard.*= 3, but there are 4 processes; use NPROC=3, or dp_shard = -1"),
    (4, ["ep=3"], r"parallelism\.ep = 3 must divide dp_shard \* cp = 4, whose ranks it borrows: 1, 2, 4"),
    (8, ["dp_replicate=2", "ep=8"], r"must divide dp_shard \* cp = 4"),
    (6, ["ep=6"], r"parallelism\.ep = 6 must divide model\.moe\.experts = 16: 1, 2, 4, 8, 16"),
    (10, ["ep=2"], r"experts of a rank can't be sharded evenly over 5 ranks.*hidden_dim / tp = 192"),
    (3, ["cp=3"], r"training\.seq_len = 256 must be a multiple of 2 \* parallelism\.cp = 6"),
    (5, [], r"training\.batch_size = 8 is not a multiple of 5"),
    (10**9 - 1, ["tp=2"], r"999999999 processes are not a multiple of .* = 2; 1, 3, 9, 27, .* would be"),
    (16, [], r"training\.batch_size = 8 is not a multiple of 16"),
]


@pytest.mark.parametrize(("world", "words", "message"), WORLDS)
def test_impossible_layouts(world: int, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config("debug", [f"--parallelism.{word}" for word in words], world_size=world)


@pytest.mark.parametrize("schedule", ["ZBVZeroBubble", "InterleavedZeroBubble"])
def test_zero_bubble_schedules_are_refused_with_the_reason(schedule: str) -> None:
    with pytest.raises(UserError, match=rf"pp_schedule = '{schedule}': .*after FSDP has freed the weights"):
        load_config("debug", [f"--parallelism.pp_schedule={schedule}"])


PIPELINES = [
    (["pp_layers=[1,1,1]"], r"stages of at least one block each must add up to model\.layers = 4"),
    (["pp_layers=[2,1,1]"], r"3 stages; 1F1B over 2 ranks needs 2"),
    (
        ["pp_schedule=Interleaved1F1B", "pp_layers=[2,2]"],
        r"2 stages; Interleaved1F1B over 2 ranks needs a multiple of 2",
    ),
    (
        ["pp_schedule=Interleaved1F1B"],
        r"1 microbatches a step; Interleaved1F1B needs a multiple of parallelism\.pp = 2",
    ),
    ([], r"1 microbatches a step for 2 stages; 1F1B needs at least as many, or take pp_schedule = 'GPipe'"),
]


@pytest.mark.parametrize(("words", "message"), PIPELINES)
def test_impossible_pipelines(words: list[str], message: str) -> None:
    options = ["--parallelism.pp=2", *(f"--parallelism.{word}" for word in words)]
    with pytest.raises(UserError, match=message):
        load_config("debug", options, world_size=2)


def test_a_possible_layout() -> None:
    load_config("debug", ["--parallelism.ep=2", "--parallelism.cp=2", "--parallelism.dp_replicate=2"], world_size=8)


def test_the_written_configuration_reads_back(tmp_path: Path) -> None:
    config = load_config("medium_deepseek", ['--data.corpus=["a", "b"]'])
    again = load_config(write(tmp_path / "config.toml", to_toml(config)))
    assert again == config


def test_help_describes_every_option() -> None:
    text = options_help()
    for key in all_keys():
        assert f"--{key}=" in text
    lines = text.splitlines()
    for line, after in pairwise(lines):
        if line.startswith("  --"):
            assert after.startswith("      "), line


def test_schema_is_shipped_and_accepts_every_configuration() -> None:
    shipped = json.loads((CONFIG_DIR.parent / "titan_moe/config/schema.json").read_text())
    assert shipped == json_schema()
    jsonschema.Draft202012Validator.check_schema(shipped)
    for path in SHIPPED:
        jsonschema.validate(tomli.loads(path.read_text()), shipped)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"model": {"dimm": 3}}, shipped)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_configurations_are_valid(path: Path) -> None:
    load_config(path.stem)


def test_the_debug_configuration_is_sparse_and_enables_four_losses() -> None:
    config = load_config("debug")
    assert config.model.layers >= 4
    assert (config.model.moe.experts, config.model.moe.top_k) == (16, 2)
    assert all(config.regularizers.options()[name].weight > 0 for name in ("lb", "z", "sp", "cp"))


def test_the_base_configuration_enables_only_global_load_balancing() -> None:
    config = load_config("base")
    weights = {name: options.weight for name, options in config.regularizers.options().items()}
    assert weights.pop("lb") == 0.01
    assert not any(weights.values())
    assert config.regularizers.lb.scope == "global"
    assert config.balancer.rate == 0.0


SPELLINGS = {
    "--optimizer.lr=.001": 0.001,
    "--optimizer.lr=1.e-4": 1e-4,
    "--optimizer.lr=+1E-4": 1e-4,
    "--optimizer.lr= 1 ": 1.0,
    "--metrics.tensorboard=True": True,
    "--metrics.tensorboard=FALSE": False,
    "--training.steps=1e3": 1000,
    "--training.steps=1_000": 1000,
    "--training.steps=20.": 20,
    "--parallelism.pp_layers=1,1": [1, 1],
    "--parallelism.pp_layers=[2, 2]": [2, 2],
    "--regularizers.measure=o, v": ["o", "v"],
    "--regularizers.measure=": [],
    "--training.dtype=float32": "float32",
    "--job.name=1e3": "1e3",
    "--job.name=True": "True",
}


@pytest.mark.parametrize("word", SPELLINGS)
def test_values_as_people_type_them(word: str) -> None:
    config = load_config("debug", [word])
    section, key = word[2:].partition("=")[0].split(".")
    value = getattr(getattr(config, section), key)
    assert value == SPELLINGS[word]
    assert type(value) is type(SPELLINGS[word])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optimizer]\nlr = .001", r"not valid TOML: .*line 2.*; write lr = 0\.001$"),
        ("[optimizer]\nlr = 1.e-4  # low", r"; write lr = 0\.0001$"),
        ("[metrics]\ntensorboard = True", r"; write tensorboard = true$"),
        ("[job]\nname = mine", r"; text needs quotes: name = \"mine\"$"),
        ("[training]\nsteps = 1e3", r"training\.steps = 1000\.0: .*; write 1000$"),
        ("[regularizers]\nlb = 0.1", r"regularizers\.lb = 0\.1: .* is a table; set a key in it: .*regularizers\.lb\.weight"),
        ('[training]\nextends = "base.toml"', r"\[training\] extends: must stand at the top of the file"),
        ("a = " + "9" * 5000, r"not valid TOML: .*4300 digits"),
        ("[training]\nsteps = " + "9" * 30, r"training\.steps = 9{30}: is too large"),
        ('[job]\nname = "a\\u0000b"', r"job\.name = 'a\\x00b': contains a NUL"),
        ('[data]\ncorpus = ["a", "b\\u0000"]', r"data\.corpus = 'b\\x00': contains a NUL"),
        ('[job]\nname = "a\\nb"', r"job\.name = 'a\\nb' must be a plain name, without '/' and line ends"),
        ("[model]\ndim = 1_000_000_000_000", r"model\.dim = 1,000,000,000,000 is too large"),
        ("[model]\nlayers = 1_000_000_000_000", r"model\.layers = .*less than or equal to 10000"),
        ("[model]\nvocab_size = 100_000_000_000", r"model\.vocab_size = 100,000,000,000 is too large"),
        ("[training]\nseq_len = 1_000_000_000_000", r"training\.seq_len = 1,000,000,000,000 is too large"),
    ],
)  # fmt: skip
def test_a_value_that_is_wrong_is_one_short_line_with_the_right_spelling(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config(write(tmp_path / "bad.toml", text))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_table_without_its_key_on_the_command_line_names_the_keys() -> None:
    with pytest.raises(UserError, match=r"command line: regularizers\.lb = 0\.1: .*regularizers\.lb\.weight"):
        load_config("debug", ["--regularizers.lb=0.1"])


def test_names_that_no_directory_can_have() -> None:
    load_config("debug", ["--job.name=" + "é" * 127])
    for name, message in (("é" * 128, "longer than the 255 bytes"), ("\udcff", "not UTF-8"), ("a\tb", "plain name")):
        with pytest.raises(UserError, match=message):
            load_config("debug", [f"--job.name={name}"])
    with pytest.raises(UserError, match="no configuration"):
        load_config("x" * 1000)


PATHS = ["job.output_dir", "data.cache_dir", "checkpoint.load_path", "checkpoint.upcycle_path"]


@pytest.mark.parametrize("key", PATHS)
def test_a_home_directory_is_expanded_in(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    section, name = key.split(".")
    file = write(tmp_path / "mine.toml", f'extends = "debug.toml"\n[{section}]\n{name} = "~/x"')
    for config in (load_config("debug", [f"--{key}=~/x"]), load_config("~/mine.toml"), load_config(file)):
        assert getattr(getattr(config, section), name) == str(tmp_path / "x")
    assert load_config("debug", [f"--{key}=a~b"]).model_dump()[section][name] == "a~b"


def test_extensions_and_extended_files_in_a_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text("")
    config = load_config("debug", ["--extensions.modules=~/mine.py"])
    assert config.extensions.modules == [str(tmp_path / "mine.py")]
    write(tmp_path / "mine.toml", "[model]\ndim = 64")
    (tmp_path / "below").mkdir()
    assert load_config(write(tmp_path / "below" / "x.toml", 'extends = "~/mine.toml"')).model.dim == 64


def test_a_home_directory_that_is_not_known() -> None:
    with pytest.raises(
        UserError, match=r"command line: job\.output_dir = '~nobody-has-this-name/x': no home directory"
    ):
        load_config("debug", ["--job.output_dir=~nobody-has-this-name/x"])


WITHOUT_EFFECT = [
    (["model.moe.top_k=1", "model.moe.normalize_topk=true"], {"lb", "z", "cp"}, "no gradient from the cross-entropy"),
    (["model.moe.top_k=1"], {"v"}, r"regularizers\.v\.weight has no effect"),
    (["model.moe.top_k=16"], {"lb"}, r"regularizers\.lb\.weight has no effect"),
    (["model.moe.top_k=16"], {"cp"}, r"regularizers\.cp\.weight has no effect"),
    (["model.moe.top_k=16", "balancer.rate=1e-3"], {"z"}, r"balancer\.rate has no effect"),
    (["model.moe.first_dense_layers=4", "balancer.rate=1e-3"], set(), r"balancer\.rate has no effect"),
    (["balancer.center=true"], {"lb"}, r"balancer\.center has no effect"),
]


@pytest.mark.parametrize(("words", "terms", "message"), WITHOUT_EFFECT)
def test_settings_without_effect_are_named(words: list[str], terms: set[str], message: str) -> None:
    options = [f"--regularizers.{name}.weight={1e-3 * (name in terms)}" for name in REGISTRY]
    (line,) = without_effect(load_config("debug", [*options, *(f"--{word}" for word in words)]))
    assert re.search(message, line)


def test_shipped_configurations_have_no_settings_without_effect() -> None:
    for path in SHIPPED:
        assert not list(without_effect(load_config(path.stem))), path
