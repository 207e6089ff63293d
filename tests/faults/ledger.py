"""What happened, in the order in which a caller saw it: one JSON line an entry, only ever appended.

Kinds of entries, beside `t` (monotonic seconds) and `kind`:

    ask      request, streams (bool), outputs, tokens, exact (bool), truth
             A caller has sent a request. `tokens` is max_tokens; `exact` promises that the answer
             ends by length alone; `truth` maps an output to what it must become, if that is known.
    tokens   request, output, index, ids    New tokens; `index` is the place of the first of them.
    text     request, output, text
    end      request, how, worker, code, message, counts, reasons, resumes
             `how` is finished, failed (an event) or status; a call that ends after its terminal
             event with status OK has no entry of its own.
    cancel   request                         The caller has given it up and wants nothing more.
    scored   request, count                  A score's one answer.
    fault    fault, name, target, allows     Something was broken on purpose.
    effect   fault, evidence                 How one could see that.
    healed   fault, seconds                  Everything serves again, without a hand.
    improper method, answer                  Nonsense got an answer that blames the wrong side.
    rest     worker, running, waiting, blocks, open    What is still held when nothing is asked.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

Entry = dict[str, Any]


class Ledger:
    """An append-only file of entries."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a", encoding="utf-8", buffering=1 << 16)

    def note(self, kind: str, **fields: Any) -> None:
        """Appends one entry."""
        entry = {"t": round(time.monotonic(), 6), "kind": kind, **fields}
        self._file.write(json.dumps(entry, separators=(",", ":")) + "\n")

    def entries(self) -> list[Entry]:
        """Everything noted so far."""
        self._file.flush()
        return list(read(self.path))

    def close(self) -> None:
        """Ends the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


def read(path: Path) -> Iterator[Entry]:
    """The entries of a ledger's file."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
