"""Tokenizer, chat template and generation defaults of a checkpoint."""

import shutil
from pathlib import Path

import pytest

from conclave.worker.errors import CheckpointError, InvalidRequest
from conclave.worker.text.tokenizer import Tokenizer


def test_text_gets_the_beginning_token(byte_tokenizer: Tokenizer) -> None:
    assert byte_tokenizer.encode("a") == [2, 16 + ord("a")]
    assert byte_tokenizer.encode("a", special=False) == [16 + ord("a")]


def test_chat_renders_roles_thinking_and_tools(byte_tokenizer: Tokenizer) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    tool = {"type": "function", "function": {"name": "now"}}
    ids = byte_tokenizer.chat(turns, thinking=True, tools=[tool])
    assert byte_tokenizer.decode(ids, skip_special=False) == (
        "<bos><|turn>system\n<|think|>"
        '<|tool>{"type": "function", "function": {"name": "now"}}<tool|>Be brief.<turn|>\n'
        "<|turn>user\nHi<turn|>\n<|turn>model\n"
    )


def test_chat_may_continue_the_last_turn(byte_tokenizer: Tokenizer) -> None:
    turns = [{"role": "user", "content": "Hi"}]
    ids = byte_tokenizer.chat(turns, add_generation_prompt=False)
    assert byte_tokenizer.decode(ids, skip_special=False).endswith("Hi<turn|>\n")


def test_template_refusal_reaches_the_caller(byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="no tool turns here"):
        byte_tokenizer.chat([{"role": "tool", "content": "42"}])


def test_template_cannot_reach_out_of_its_sandbox(text_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "evil"
    shutil.copytree(text_checkpoint, folder)
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InvalidRequest):
        Tokenizer(folder).chat([{"role": "user", "content": "Hi"}])


def test_generation_defaults(byte_tokenizer: Tokenizer) -> None:
    assert byte_tokenizer.stop_ids == (1, 5)
    assert byte_tokenizer.sampling_defaults == {"temperature": 0.5, "top_k": 40}
    assert byte_tokenizer.suppressed_ids == ()


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", Path(__file__)):
        with pytest.raises(CheckpointError, match=path.name):
            Tokenizer(path)


def test_folder_without_tokenizer_serves_ids_only(tmp_path: Path) -> None:
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.decode([1, 2, 3]) == "" and tokenizer.stop_ids == ()
    with pytest.raises(InvalidRequest, match="token_ids"):
        tokenizer.encode("text")
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.chat([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_broken_file_is_named(text_checkpoint: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(text_checkpoint, folder)
    (folder / name).write_text("{")
    with pytest.raises(CheckpointError, match=name):
        Tokenizer(folder)


def test_lone_surrogate_is_refused(byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="Unicode"):
        byte_tokenizer.encode("a\ud800")
