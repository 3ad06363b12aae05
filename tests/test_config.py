"""The training file: every key checked, every mistake named."""

import pytest

from adaptis.config import Config, load_config, parse_words
from adaptis.errors import InputError


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "train.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_nothing_given_is_the_defaults():
    assert load_config(None) == Config()


def test_a_file_is_read_and_options_take_precedence(written):
    path = written('[model]\npreset = "tiny"\n[train]\nsteps = 7\nlearning_rate = 1\n')
    found = load_config(path, {"train.steps": "9", "train.resume": "true", "data.text": "a b"})
    assert found.model.preset == "tiny"
    assert (found.train.steps, found.train.resume, found.data.text) == (9, True, "a b")
    assert found.train.learning_rate == 1.0
    assert type(found.train.learning_rate) is float


def test_training_is_on_the_cpu_unless_a_gpu_is_asked_for(written):
    assert load_config(None).train.device == "cpu"
    assert load_config(written('[train]\ndevice = "cuda"\n')).train.device == "cuda"


@pytest.mark.parametrize(("text", "kept"), [("2024", "2024"), ('"a b"', "a b"), ("x=1", "x=1")])
def test_an_option_that_must_be_a_string_is_one(text, kept):
    assert load_config(None, {"train.folder": text}).train.folder == kept


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("steps", "is no TOML"),
        (b"\x80\x81", "is not text"),
        ("steps = 1", "unknown steps"),
        ("[training]", "unknown section [training]"),
        ("train = 3", "a section [train] is needed"),
        ("[train]\nstep = 1", "unknown key 'step' in [train]"),
        ("[train]\nsteps = 1\nsteps = 2", "is no TOML"),
        ('[train]\nsteps = "1"', "train.steps is '1', an integer is needed"),
        ("[train]\nsteps = true", "train.steps is True, an integer is needed"),
        ("[train]\nsteps = 1.5", "train.steps is 1.5, an integer is needed"),
        ("[train]\nsteps = 0", "train.steps is 0, at least 1 is needed"),
        (f"[train]\nsteps = {10**30}", "a smaller integer is needed"),
        ("[train]\ndevices = 0", "train.devices is 0"),
        ("[train]\nmicrobatches = -1", "train.microbatches is -1"),
        ('[train]\nautocast = "half"', "train.autocast is 'half'; give bfloat16, or leave"),
        ('[train]\ndevice = "tpu"', "train.device is 'tpu'; give cuda, or leave"),
        ("[train]\nlearning_rate = nan", "train.learning_rate is nan, a finite number is needed"),
        ("[train]\nsearch_seconds = inf", "a finite number is needed"),
        ("[train]\nsearch_seconds = -1", "at least 0 is needed"),
        ('[train]\nresume = "no"', "true or false is needed"),
        ('[train]\nfolder = ""', "train.folder is empty"),
        ("[train]\nfolder = 3", "a string is needed"),
        ("[data]\nsequence = -1", "data.sequence is -1"),
    ],
)
def test_a_mistake_is_named(written, text, part):
    path = written(text)
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert str(caught.value).startswith(str(path))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_a_folder_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "absent.toml"):
        with pytest.raises(InputError, match="cannot be read"):
            load_config(path)


@pytest.mark.parametrize(
    "words",
    [
        ["a.toml", "--train.steps", "6", "--data.text=x=y"],
        ["--train.steps", "6", "a.toml", "--data.text=x=y"],
        ["--train.steps=6", "--data.text", "x=y", "a.toml"],
    ],
)
def test_the_file_and_the_options_come_in_any_order(words):
    assert parse_words(words) == ("a.toml", {"train.steps": "6", "data.text": "x=y"})


def test_a_negative_number_is_a_value():
    assert parse_words(["--train.seed", "-1"]) == (None, {"train.seed": "-1"})


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["a.toml", "b.toml"], "b.toml: unexpected"),
        (["--steps", "3"], "--steps: no such option"),
        (["-x"], "-x: no such option"),
        (["--train.steps"], "--train.steps: a value is missing"),
        (["--train.steps", "--train.seed", "3"], "--train.steps: a value is missing"),
    ],
)
def test_a_word_that_is_neither_is_refused(words, part):
    with pytest.raises(InputError, match=part):
        parse_words(words)


def test_an_option_of_no_section_is_refused():
    with pytest.raises(InputError, match="unknown section"):
        load_config(None, {"nothing.steps": "3"})
    with pytest.raises(InputError, match="unknown key 'nothing'"):
        load_config(None, {"train.nothing": "3"})
