from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from adaptis import corpus
from adaptis.errors import InputError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTIS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    text = tmp_path / "text"
    (text / "sub").mkdir(parents=True)
    (text / "b.txt").write_text("hello world, hello pipelines. " * 40)
    (text / "a.py").write_text("def f(x):\n    return x + 1\n" * 40)
    (text / "sub" / "c.md").write_text("äöü " * 30, encoding="utf-8")
    (text / "picture.png").write_bytes(b"\x00\x01")
    return text


def test_the_default_text_is_the_standard_library_as_bytes():
    found = corpus.load_corpus()
    assert found.vocabulary == 257
    assert 1_000_000 < len(found.tokens) < 6_000_000
    assert found.tokens.min() >= 0
    assert found.tokens.max() == 256
    assert b"import" in found.tokens[:200_000].astype(np.uint8).tobytes()


def test_bytes_of_files_come_back_in_the_order_of_their_names(folder):
    tokens = corpus.load_corpus(folder).tokens
    documents = np.split(tokens, np.flatnonzero(tokens == 256) + 1)[:-1]
    texts = [bytes(document[:-1].astype(np.uint8)).decode() for document in documents]
    expected = [
        (folder / name).read_text(encoding="utf-8") for name in ("a.py", "b.txt", "sub/c.md")
    ]
    assert texts == expected


def test_a_trained_bpe_reads_back_as_the_text(folder, cache):
    found = corpus.load_corpus(folder / "b.txt", "bpe", 300)
    assert found.vocabulary == 300
    assert len(found.tokens) < 40 * 30 / 2
    (saved,) = cache.glob("*.json")
    tokenizers = pytest.importorskip("tokenizers")
    text = tokenizers.Tokenizer.from_str(saved.read_text()).decode(found.tokens.tolist())
    assert text == (folder / "b.txt").read_text()
    by_path = corpus.load_corpus(folder / "b.txt", str(saved))
    assert np.array_equal(by_path.tokens, found.tokens)


def test_the_second_start_reads_the_cache(folder, cache, monkeypatch):
    first = corpus.load_corpus(folder, "bpe", 280)
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setattr(corpus, "_read", lambda _: pytest.fail("the text was read again"))
    second = corpus.load_corpus(folder, "bpe", 280)
    assert np.array_equal(first.tokens, second.tokens)


def test_a_changed_file_or_a_broken_cache_is_tokenized_again(folder, cache):
    first = corpus.load_corpus(folder)
    (saved,) = cache.glob("*.npy")
    saved.write_bytes(b"broken")
    assert np.array_equal(corpus.load_corpus(folder).tokens, first.tokens)
    (folder / "b.txt").write_text("other")
    assert not np.array_equal(corpus.load_corpus(folder).tokens, first.tokens)


def test_batches_depend_on_seed_and_step_alone_and_labels_are_the_next_tokens(folder):
    text = corpus.load_corpus(folder)
    batches = text.batch(3, 4, 2, 16, seed=7)
    assert len(batches) == 4
    for batch in batches:
        assert batch["inputs"].shape == batch["labels"].shape == (2, 16)
        assert batch["inputs"].dtype == np.int64
        assert np.array_equal(batch["inputs"][:, 1:], batch["labels"][:, :-1])
    again = text.batch(3, 4, 2, 16, seed=7)
    assert all(
        np.array_equal(a["inputs"], b["inputs"]) for a, b in zip(batches, again, strict=True)
    )
    for other in (text.batch(4, 4, 2, 16, seed=7), text.batch(3, 4, 2, 16, seed=8)):
        assert not np.array_equal(other[0]["inputs"], batches[0]["inputs"])


def test_a_text_shorter_than_a_sequence_is_refused(folder):
    text = corpus.load_corpus(folder)
    longest = len(text.tokens) - 1
    assert text.batch(0, 1, 1, longest)[0]["labels"].shape == (1, longest)
    with pytest.raises(InputError, match="text longer"):
        text.batch(0, 1, 1, longest + 1)
    with pytest.raises(InputError, match="at least 1"):
        text.batch(0, 0, 1, 8)


def test_bad_sources_and_tokenizers_are_refused_in_one_sentence(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({"model": 1}))
    for source, tokenizer, size, message in (
        (tmp_path / "none", "bytes", 0, "no such file or folder"),
        (empty, "bytes", 0, "holds no text"),
        (folder, "wordpiece", 0, "no such tokenizer"),
        (folder, str(broken), 0, "is no tokenizer.json"),
        (folder, "bpe", 256, "at least 257"),
    ):
        with pytest.raises(InputError, match=message):
            corpus.load_corpus(source, tokenizer, size)


def test_the_corpus_needs_no_torch():
    code = "import sys, adaptis.corpus; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
