"""Real text as training data, with no download: token ids in micro-batches.

The default text is Python's own standard library and its manual; a user's files work the same.
Tokens are cached, so a second start takes no time. Batches depend on (seed, step) alone, never on
how many processes there are. Nothing here knows torch or models; `tokenizers` is imported where it
is used.

Shapes: B micro-batch, S sequence.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from adaptis.errors import InputError
from adaptis.files import write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Tokens = NDArray[np.int32]
BYTES, BPE = "bytes", "bpe"
END = "<eos>"  # between documents
NUM_BYTES = 256
MAX_TEXT_BYTES = 4_000_000  # enough for a demo, and quick to tokenize at first use
_VERSION = 1  # of the cached files
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_SUFFIXES = {".py", ".txt", ".md", ".rst"}


@dataclass(frozen=True)
class Corpus:
    """One long row of tokens, documents in a fixed order with an end mark after each."""

    name: str
    tokens: Tokens
    vocabulary: int  # every token is below it

    def batch(
        self, step: int, num_microbatches: int, batch_size: int, sequence: int, seed: int = 0
    ) -> tuple[dict[str, NDArray[np.int64]], ...]:
        """The micro-batches of one step: inputs_BS, and labels_BS, which are the next tokens.

        Raises:
            InputError: if the text is shorter than one sequence.
        """
        room = len(self.tokens) - sequence
        if min(num_microbatches, batch_size, sequence) < 1 or room < 1:
            raise InputError(
                f"{num_microbatches} micro-batches of {batch_size} x {sequence} tokens from a text "
                f"of {len(self.tokens)}: each number must be at least 1, and the text longer"
            )
        draw = np.random.default_rng([seed, step])
        starts = draw.integers(0, room, (num_microbatches, batch_size, 1))
        rows = self.tokens[starts + np.arange(sequence + 1)].astype(np.int64)
        return tuple({"inputs": row[:, :-1].copy(), "labels": row[:, 1:].copy()} for row in rows)


def load_corpus(
    source: str | Path | None = None, tokenizer: str = BYTES, vocabulary: int = 8192
) -> Corpus:
    """The text of `source` (None: Python's own), tokenized, from the cache where possible.

    `tokenizer` is "bytes" (256 tokens and an end mark), "bpe" (trained on this text at first use,
    with `vocabulary` tokens), or the path of a `tokenizer.json`.

    Raises:
        InputError: if there is no text, or no such tokenizer.
    """
    documents = _standard_library() if source is None else _files(Path(source))
    name = "python" if source is None else Path(source).name
    if tokenizer == BPE and vocabulary <= NUM_BYTES:
        raise InputError(f"a bpe of {vocabulary} tokens: at least {NUM_BYTES + 1} are needed")
    text = [f"{_VERSION} {MAX_TEXT_BYTES} {tokenizer} {sys.version_info[:3]}"]
    text += [f"{path} {stamp}" for path, _, stamp in documents]
    if tokenizer == BPE:
        text.append(str(vocabulary))
    elif tokenizer != BYTES:
        text.append(hashlib.sha256(_read_tokenizer(tokenizer).encode()).hexdigest())
    key = hashlib.sha256("\n".join(text).encode()).hexdigest()[:20]
    cached = cache_folder() / f"{name}-{key}.npy"
    encode, size = _tokenizer(tokenizer, vocabulary, documents, cached.with_suffix(".json"))
    tokens = _cached(cached)
    if tokens is None:
        tokens = encode(_read(documents))
        _write_array(cached, tokens)
    if len(tokens) and int(tokens.max()) >= size:
        raise InputError(f"{cached}: holds tokens beyond {size}; delete the file")
    return Corpus(name, tokens, size)


def cache_folder() -> Path:
    """Where tokenizers and tokens are kept: $ADAPTIS_CACHE, or ~/.cache/adaptis."""
    chosen = os.environ.get("ADAPTIS_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "adaptis"


_Document = tuple[str, Path | None, int]  # its name, where it is (None: a topic), its stamp


def _standard_library() -> list[_Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[tuple[str, Path | None, int]] = [
        (path.relative_to(root).as_posix(), path, path.stat().st_size)
        for path in root.rglob("*.py")
        if not _SKIPPED & set(path.relative_to(root).parts)
    ]
    found += [(f"topics/{name}", None, len(text)) for name, text in _topics().items()]
    return _thin(sorted(found, key=lambda document: document[0]))


def _thin(documents: list[_Document]) -> list[_Document]:
    """Every k-th document, so that the text stays small but keeps its variety."""
    total = sum(size for _, _, size in documents)
    return documents[:: max(1, -(-total // MAX_TEXT_BYTES))]


def _topics() -> dict[str, str]:
    with contextlib.suppress(ImportError):
        from pydoc_data.topics import topics

        return dict(topics)
    return {}  # some installations leave the manual out


def _files(source: Path) -> list[_Document]:
    if source.is_file():
        paths = [source]
    elif source.is_dir():
        paths = [p for p in source.rglob("*") if p.suffix in _SUFFIXES and p.is_file()]
    else:
        raise InputError(f"{source}: no such file or folder; give the path of your text")
    if not paths:
        raise InputError(f"{source}: holds no text ({', '.join(sorted(_SUFFIXES))}); add some")
    names = [p.name if p == source else p.relative_to(source).as_posix() for p in paths]
    stamps = [p.stat().st_mtime_ns ^ p.stat().st_size for p in paths]
    return sorted(zip(names, paths, stamps, strict=True), key=lambda document: document[0])


def _read(documents: Sequence[_Document]) -> list[str]:
    topics = _topics() if any(path is None for _, path, _ in documents) else {}
    texts: list[str] = []
    for name, path, _ in documents:
        try:
            text = (
                topics[name.removeprefix("topics/")]
                if path is None
                else path.read_text(encoding="utf-8", errors="ignore")
            )
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        texts.append(text)
    return texts


def _tokenizer(
    kind: str, vocabulary: int, documents: Sequence[_Document], cached: Path
) -> tuple[Callable[[Sequence[str]], Tokens], int]:
    """A function from texts to tokens, and the number of different tokens."""
    if kind == BYTES:
        return _encode_bytes, NUM_BYTES + 1
    tokenizer: Any = None
    if kind != BPE:
        tokenizer = _parse_tokenizer(_read_tokenizer(kind), kind)
    else:
        with contextlib.suppress(OSError, InputError):
            tokenizer = _parse_tokenizer(cached.read_text(encoding="utf-8"), str(cached))
        if tokenizer is None:
            tokenizer = _train(_read(documents), vocabulary)
            write_text(cached, tokenizer.to_str())
    end = tokenizer.token_to_id(END)

    def encode(texts: Sequence[str]) -> Tokens:
        rows = [row.ids for row in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        mark = [] if end is None else [end]
        return np.concatenate([np.array(row + mark, dtype=np.int32) for row in rows])

    # The size is what a model's embedding needs, also where a small text has fewer tokens.
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    return encode, max(size, vocabulary) if kind == BPE else size


def _encode_bytes(texts: Sequence[str]) -> Tokens:
    rows = [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) for text in texts]
    end = np.array([NUM_BYTES], dtype=np.int32)
    return np.concatenate([part for row in rows for part in (row, end)])


def _train(texts: Sequence[str], vocabulary: int) -> Any:
    tokenizers = _library()
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise InputError(
            'a tokenizer needs the package tokenizers: pip install "adaptis[torch]", or take bytes'
        ) from None
    return tokenizers


def _read_tokenizer(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise InputError(
            f"{path}: no such tokenizer; give {BYTES!r}, {BPE!r} or the path of a tokenizer.json"
        ) from None


def _parse_tokenizer(text: str, where: str) -> Any:
    tokenizers = _library()
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{where}: is no tokenizer.json ({error}); check the file") from None


def _cached(path: Path) -> Tokens | None:
    """The tokens in `path`, or None where there are none that can be used."""
    with contextlib.suppress(OSError, ValueError):
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        if tokens.dtype == np.int32 and tokens.ndim == 1:
            return tokens
    return None


def _write_array(path: Path, tokens: Tokens) -> None:
    """Write atomically, since several processes may start at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                np.save(file, tokens)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); set ADAPTIS_CACHE to a folder that can"
        ) from None
