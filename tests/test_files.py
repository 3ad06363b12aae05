import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptis.errors import InputError
from adaptis.files import Fields, parse_json, read_json, write_json, write_text


def names(folder):
    return [path.name for path in folder.iterdir()]


def refused(text):
    with pytest.raises(InputError) as caught:
        parse_json(text, "here.json")
    message = str(caught.value)
    assert message.startswith("here.json: ")
    assert "\n" not in message
    return message


def test_a_duplicate_key_is_refused_by_name():
    assert "'a' appears twice" in refused('{"a": 1, "b": {}, "a": 1}')


def test_a_duplicate_key_deep_inside_is_refused():
    assert "'x' appears twice" in refused('{"a": [{"b": {"x": 1, "x": 2}}]}')


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_constants_that_json_does_not_know_are_refused(constant):
    assert constant in refused(f'{{"a": [{constant}]}}')


@pytest.mark.parametrize(
    "text", ["", "{", "[1,]", "{'a': 1}", '{"a": 1} x', "\ufeff{}", '{"a": 01}']
)
def test_what_is_no_json_is_refused_with_its_line_and_column(text):
    message = refused(text)
    assert "line 1, column" in message
    assert "not JSON" in message


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("[]", "a list"),
        ("1", "an integer"),
        ("1.5", "a fraction"),
        ("null", "null"),
        ('"x"', "a string"),
    ],
)
def test_only_an_object_is_a_file(text, name):
    assert f"holds {name}, a JSON object is needed" in refused(text)


def test_deep_nesting_is_refused():
    assert "nested too deeply" in refused('{"a":' * 100_000 + "1" + "}" * 100_000)
    assert "nested too deeply" in refused('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")


def test_a_number_with_too_many_digits_is_refused():
    assert "too many digits" in refused('{"a": ' + "9" * 10_000 + "}")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.json: no such plan; check the path"):
        read_json(tmp_path / "nothing.json", "plan")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="is a folder, a plan is needed"):
        read_json(tmp_path, "plan")


def test_a_file_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("{}")
    with pytest.raises(InputError, match="cannot be read"):
        read_json(tmp_path / "file" / "below.json")


def test_a_binary_file_is_refused(tmp_path):
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    with pytest.raises(InputError, match="is not text"):
        read_json(tmp_path / "binary")


def test_a_file_that_is_too_large_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr("adaptis.files.MAX_FILE_BYTES", 10)
    (tmp_path / "large.json").write_text('{"a": 1234567}')
    with pytest.raises(InputError, match="14 bytes is too large for a profile"):
        read_json(tmp_path / "large.json", "profile")


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(value=st.dictionaries(st.text(), values))
def test_what_is_written_is_read_back(value, tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "value.json"
    write_json(path, value)
    assert read_json(path) == value


def test_writing_makes_the_folder_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a" / "b" / "value.json"
    write_json(path, {"a": 1})
    assert names(path.parent) == ["value.json"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "value.json"
    write_json(path, {"a": "old"})

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(InputError, match="cannot be written \\(No space left on device\\)"):
        write_json(path, {"a": "new"})
    assert read_json(path) == {"a": "old"}
    assert names(tmp_path) == ["value.json"]


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"a": "old"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": "old"}


def test_readers_see_the_old_file_or_the_new_one_never_half(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"a": [0] * 20_000})
    done = threading.Event()

    def write():
        for i in range(60):
            write_json(path, {"a": [i] * 20_000}, indent=None)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = 0
    while not done.is_set() or not seen:
        value = json.loads(path.read_text())["a"]
        assert len(value) == 20_000
        assert len(set(value)) == 1
        seen += 1
    writer.join()


def test_a_file_cannot_be_written_where_a_folder_is(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        write_text(tmp_path / "folder", "x")
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize(
    ("value", "kind", "sentence"),
    [
        (1, str, "'k' is an integer, a string is needed"),
        (True, int, "'k' is true or false, an integer is needed"),
        (1, bool, "'k' is an integer, true or false is needed"),
        (1.0, int, "'k' is a fraction, an integer is needed"),
        (None, list, "'k' is null, a list is needed"),
        ([], dict, "'k' is a list, an object is needed"),
    ],
)
def test_a_wrong_type_is_named_with_the_right_one(value, kind, sentence):
    with pytest.raises(InputError, match=sentence):
        Fields({"k": value}, "file").take("k", kind)


@pytest.mark.parametrize("value", [True, "1", None, [], {}])
def test_only_numbers_are_numbers(value):
    with pytest.raises(InputError, match=r"file: 'k' is .*, a number is needed"):
        Fields({"k": value}, "file").number("k")


@pytest.mark.parametrize("value", [-1e-9, -1, float("inf"), float("-inf"), float("nan"), 10**400])
def test_numbers_are_finite_and_not_below_the_least(value):
    with pytest.raises(InputError, match="file: 'k' is "):
        Fields({"k": value}, "file").number("k")


@pytest.mark.parametrize("value", [0, 1 << 62, -1, 10**30])
def test_counts_stay_in_their_range(value):
    with pytest.raises(InputError, match="an integer >= 1 is needed"):
        Fields({"k": value}, "file").count("k", least=1)


def test_an_overflowing_number_is_no_finite_number():
    with pytest.raises(InputError):
        Fields(parse_json('{"k": 1e999}', "file"), "file").number("k")


def test_absent_keys_take_the_default_or_are_missed():
    fields = Fields({}, "file")
    assert fields.take("a", str, "x") == "x"
    assert fields.number("a", 2.0) == 2.0
    assert fields.count("a", None) is None
    for take in (
        lambda: fields.take("a", str),
        lambda: fields.number("a"),
        lambda: fields.count("a"),
    ):
        with pytest.raises(InputError, match="file: the key 'a' is missing"):
            take()


def test_an_unknown_key_is_refused_by_name():
    fields = Fields({"known": 1, "unknown": 2}, "file")
    fields.take("known", int)
    with pytest.raises(
        InputError, match="file: unknown key 'unknown'; remove it or fix its spelling"
    ):
        fields.done()


def test_objects_in_a_list_are_named_by_their_position():
    with pytest.raises(
        InputError, match=r"file: layers\[1\]: an integer where an object is needed"
    ):
        list(Fields({"layers": [{}, 5]}, "file").objects("layers"))


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"format": "other", "version": 1}, "the format is 'other', 'mine' is needed"),
        ({"format": "mine", "version": 3}, "version 3 of mine is newer than this program knows"),
        ({"format": "mine", "version": 0}, "an integer >= 1 is needed"),
        ({"format": "mine", "version": True}, "'version' is true or false"),
        ({"version": 1}, "the key 'format' is missing"),
        ({"format": "mine"}, "the key 'version' is missing"),
    ],
)
def test_other_formats_and_versions_are_refused(value, sentence):
    with pytest.raises(InputError, match=sentence):
        Fields(value, "file").format("mine", 2)
