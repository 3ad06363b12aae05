"""Text as batches of tensors: the same on every rank, whatever the plan."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from adaptis.corpus import load_corpus

if TYPE_CHECKING:
    from adaptis.corpus import Corpus
    from adaptis.measure.stage import Microbatch


@dataclass(frozen=True, slots=True)
class TextBatches:
    """Step to micro-batches; small and picklable, the corpus is opened in each process."""

    num_microbatches: int
    batch_size: int
    sequence: int
    tokenizer: str = "bpe"
    vocabulary: int = 8192
    text: str = ""
    seed: int = 0

    def corpus(self) -> Corpus:
        """The text behind it."""
        return _open(self.text, self.tokenizer, self.vocabulary)

    def __call__(self, step: int) -> tuple[Microbatch, ...]:
        """The micro-batches of `step`: inputs_BS and labels_BS."""
        rows = self.corpus().batch(
            step, self.num_microbatches, self.batch_size, self.sequence, self.seed
        )
        return tuple({key: torch.from_numpy(value) for key, value in row.items()} for row in rows)


@lru_cache(maxsize=4)
def _open(text: str, tokenizer: str, vocabulary: int) -> Corpus:
    return load_corpus(text or None, tokenizer, vocabulary)
