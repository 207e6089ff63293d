"""One model reads text twice: exactly, and with keys and values in narrow caches.

The exact run is that of `conclave evaluate`, so predictions are compared in the same way. What it
gave up: chunks and steps. A document is read whole, so each of its keys is made of what earlier
layers read back, but no query of an engine's kernels is run.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..compress.quality.evaluation import (
    Document,
    Scores,
    check_documents,
    compare,
    hidden_states,
    summarize,
)
from ..model.config import cache_groups
from ..model.decoder import Decoder
from .findings import Finding, LayerCount, finding
from .storing import NarrowAttention, Reading, Storage


def audit(
    decoder: Decoder,
    documents: Sequence[Document],
    max_errors: Sequence[float],
    told: Callable[[int, int], None] = lambda done, documents: None,
) -> list[Finding]:
    """What storing narrowly does to this text, for each error allowed.

    `told` is told (documents done, in all). Raises ConfigError as `check_documents` does.
    """
    check_documents(documents, decoder.config)
    longest = max(len(each.ids) for each in documents)
    ways = [Narrow(decoder, Storage.of(decoder, own, longest)) for own in max_errors]
    with torch.inference_mode():
        for number, document in enumerate(documents):
            exact = hidden_states(decoder, document)
            for way in ways:
                way.read(document, number, exact)
            told(number + 1, len(documents))
    return [way.found for way in ways]


class Narrow:
    """A model with one way to store, and what was counted of it."""

    def __init__(self, decoder: Decoder, storage: Storage) -> None:
        self.decoder = decoder
        self.storage = storage
        self.counts = {
            layer: LayerCount(layer, format, storage.max_error)
            for layer, format in storage.formats.items()
        }
        self.scores: list[Scores] = []

    def read(self, document: Document, number: int, exact: Tensor) -> None:
        """Read a document, whose `exact` hidden states [T, hidden] are there for comparison."""

        def seen(layer: int, reading: Reading) -> None:
            self.counts[layer].add(reading, number)

        length = len(document.ids)
        attention = NarrowAttention(self.decoder.config, length, self.storage, seen)
        hidden = hidden_states(self.decoder, document, attention)
        pair = ((self.decoder, exact), (self.decoder, hidden))
        self.scores.append(compare(document, pair))

    @property
    def found(self) -> Finding:
        """Of all documents."""
        groups = cache_groups(self.decoder.config)
        return finding(groups, self.counts, summarize(self.scores))
