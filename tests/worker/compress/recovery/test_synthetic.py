"""Text that teachers write: theirs by its chances, and the same again."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conclave.worker.compress.recovery import synthetic
from conclave.worker.compress.recovery.loss import hidden_states
from conclave.worker.compress.recovery.synthetic import LEAD, write_text
from conclave.worker.errors import ConfigError
from conclave.worker.model.config import ModelConfig
from conclave.worker.weights import load_decoder

Checkpoint = Callable[[str], Path]
CPU = torch.device("cpu")


def leads(vocabulary: int, length: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.randint(1, vocabulary, (5, length), generator=draw)


@pytest.mark.parametrize("variant", ["1", "3", "7", "8"])
def test_each_token_is_drawn_by_what_the_whole_text_says_of_it(
    variant: str, tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedily, so that the cache is held against the forward without one, beyond the windows."""
    folder = tiny_checkpoint(variant)
    config = ModelConfig.load(folder)

    def likeliest(
        chances: torch.Tensor, count: int, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        return chances.argmax(-1, keepdim=True)

    monkeypatch.setattr(torch.Tensor, "multinomial", likeliest)
    text = write_text([folder], leads(config.vocab_size, 40), 6, 0, CPU)
    decoder = load_decoder(folder, config, CPU, torch.float32)
    with torch.no_grad():
        logits = decoder.logits(hidden_states(decoder, text)).unflatten(0, (6, 39))
    chosen = logits[:, LEAD - 1 :].gather(2, text[:, LEAD:, None])[..., 0]
    torch.testing.assert_close(chosen, logits[:, LEAD - 1 :].amax(-1), rtol=1e-5, atol=1e-5)


def test_teachers_take_turns_and_text_leads(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tiny_checkpoint(name) for name in ("1", "3")]
    text = leads(ModelConfig.load(folders[0]).vocab_size, 24)
    monkeypatch.setattr(synthetic, "_MOST", 2)
    done: list[tuple[int, int]] = []
    written = write_text(folders, text, 7, 5, CPU, lambda *told: done.append(told))
    assert written.shape == (7, 24) and written.dtype == torch.int64
    beginnings = {tuple(row) for row in text[:, :LEAD].tolist()}
    assert {tuple(row) for row in written[:, :LEAD].tolist()} <= beginnings
    assert torch.equal(written, write_text(folders, text, 7, 5, CPU))
    assert not torch.equal(written[:4], write_text(folders[1:], text, 4, 5, CPU))
    assert not torch.equal(written, write_text(folders, text, 7, 6, CPU))
    assert done[-1] == (7 * 24, 7 * 24) and done == sorted(done)


def test_it_is_sampled_by_its_chances(tiny_checkpoint: Checkpoint) -> None:
    """One token behind the same lead, over many sequences."""
    folder = tiny_checkpoint("1")
    config = ModelConfig.load(folder)
    lead = leads(config.vocab_size, LEAD + 1)[:1]
    written = write_text([folder], lead, 4000, 1, CPU)[:, LEAD]
    decoder = load_decoder(folder, config, CPU, torch.float32)
    with torch.no_grad():
        chances = decoder.logits(hidden_states(decoder, lead))[-1].softmax(-1)
    found = written.bincount(minlength=config.vocab_size) / 4000
    off = (found - chances).abs() / (chances * (1 - chances) / 4000).sqrt().clamp(min=1e-3)
    assert off.max() < 6


def test_short_sequences_are_refused(tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="at least 9"):
        write_text([tiny_checkpoint("1")], torch.ones(2, LEAD, dtype=torch.int64), 2, 0, CPU)
