"""What is counted of errors, bytes and pools, against counts by hand; and the report's form."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from typer.testing import CliRunner, Result

from conclave.kernels.attention.cache import KVFormat
from conclave.worker.audit.counting import BINS, ErrorCount, errors_of
from conclave.worker.audit.findings import LayerCount, finding
from conclave.worker.audit.reading import audit
from conclave.worker.audit.report import as_json, as_markdown
from conclave.worker.audit.storing import (
    NarrowAttention,
    Reading,
    Storage,
    TokenBytes,
    through_cache,
)
from conclave.worker.compress.__main__ import app
from conclave.worker.compress.quality.evaluation import Document
from conclave.worker.model.config import CacheGroup, ModelConfig
from conclave.worker.model.decoder import Decoder, DenseAttention
from conclave.worker.narrow import key_rule
from conclave.worker.weights import load_decoder

TinyCheckpoint = Callable[[int | str], Path]
ABOUT = {
    "model": "m",
    "text": "t",
    "device": "cpu",
    "dtype": "float32",
    "documents": 1,
    "tokens": 9,
}

NUMBER, COUNT = {"type": ["number", "null"]}, {"type": "integer", "minimum": 0}


def of(names: str, kind: dict[str, Any]) -> dict[str, Any]:
    return dict.fromkeys(names.split(), kind)


def closed(properties: dict[str, Any]) -> dict[str, Any]:
    """An object with these properties, all of them and no other."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def listed(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


PLACE = closed(of("error", NUMBER) | of("layer document token head", COUNT) | {"side": {}})
WIDTHS = {"type": "object", "additionalProperties": COUNT}
ERRORS = closed(
    {
        **of("vectors above", COUNT),
        "within": {"type": "number", "minimum": 0, "maximum": 1},
        "worst": {"anyOf": [PLACE, {"type": "null"}]},
        "percentiles": closed(of("50 90 99 99.9", NUMBER)),
        "histogram": listed(COUNT) | {"minItems": BINS + 1, "maxItems": BINS + 1},
        "excesses": listed(PLACE),
    }
)
LAYER = closed(
    of("layer failed", COUNT)
    | of("key value", ERRORS)
    | of("second claimed", NUMBER)
    | {"stored": {"enum": ["both", "values"]}, "widths": WIDTHS}
)
GROUP = closed(
    of("codes scales indices pool bytes plain_bytes saving share most allotted", NUMBER)
    | of("rows short", COUNT)
    | {"window": {"type": ["integer", "null"]}, "layers": listed(COUNT), "format": {}}
)
AUDIT = closed(
    of("max_error second bytes plain_bytes saving", NUMBER)
    | of("failed short", COUNT)
    | {"held": {"type": "boolean"}, "errors": ERRORS, "widths": WIDTHS}
    | {"groups": listed(GROUP), "layers": listed(LAYER), "languages": {"type": "array"}}
)
REPORT = closed(of(" ".join(ABOUT), {}) | {"audits": listed(AUDIT)})


def decoder_of(folder: Path) -> Decoder:
    config = ModelConfig.load(folder)
    return load_decoder(folder, config, torch.device("cpu"), torch.float32)


def counted(*errors: list[list[float]]) -> ErrorCount:
    count = ErrorCount(0.01, 3, "key")
    for document, own in enumerate(errors):
        count.add(torch.tensor(own, dtype=torch.float64), document)
    return count


def test_errors_are_counted_to_the_last() -> None:
    found = errors_of([counted([[0.0, 0.01]] * 49 + [[0.0018, 0.0100001]])])
    assert (found.vectors, found.above, found.within) == (100, 1, 0.99)
    assert sum(found.histogram) == 100 and found.histogram[-1] == 1
    # Whatever is just the error allowed is within, in the last step.
    assert (found.histogram[0], found.histogram[3], found.histogram[BINS - 1]) == (49, 1, 49)
    assert found.percentiles["50"] == pytest.approx(0.0018, rel=0.01)
    assert found.percentiles["99"] == pytest.approx(0.01)
    (place,) = found.excesses
    assert (place.layer, place.side, place.document, place.token, place.head) == (
        3,
        "key",
        0,
        49,
        1,
    )
    assert found.worst == place


def test_what_is_no_number_is_too_far_off() -> None:
    found = errors_of([counted([[0.001, 0.002]], [[math.nan, 0.003], [0.004, math.inf]])])
    assert found.above == 2 and found.worst is not None and found.worst.error == math.inf
    assert [(place.document, place.token, place.head) for place in found.excesses] == [
        (1, 0, 0),
        (1, 1, 1),
    ]


def reading(wide: int) -> Reading:
    """Ten tokens of one head, so many with a second digit, read as they were."""
    own = torch.ones(10, 1, 64)
    has = (torch.arange(10) < wide)[:, None]
    failed = torch.zeros(10, dtype=torch.bool)
    return Reading((own, own), (own, own), has, failed, 0.0, TokenBytes(128, 4, 4, 136))


def test_pools_that_are_too_small_break_the_promise() -> None:
    """An engine makes room for one head in 32: a row for these twenty."""
    found = []
    for rows in ((1, 0), (2, 2)):
        count = LayerCount(0, KVFormat(1, 64, 8), 0.01)
        for document, wide in enumerate(rows):
            count.add(reading(wide), document)
        found.append(finding([CacheGroup(None, (0,), 128)], {0: count}, []))
    enough, short = found
    assert enough.held and enough.short == 0 and enough.groups[0].most == 0.1
    assert not short.held and short.short == 3 and short.groups[0].rows == 4
    assert short.errors.within == 1 and short.widths == {"8": 16, "16": 4}
    assert short.bytes == 128 + 4 + 4 + 4 * 136 / 20 and short.plain_bytes == 256
    assert short.saving == 1 - short.bytes / 256


@pytest.mark.parametrize("variant", [1, 3])
def test_the_report_has_its_form(tiny_checkpoint: TinyCheckpoint, variant: int) -> None:
    decoder = decoder_of(tiny_checkpoint(variant))
    found = audit(decoder, [Document("en", tuple(range(3, 40)))], (0.01, 0.3))
    report = json.loads(json.dumps(as_json(ABOUT, found), allow_nan=False))
    jsonschema.validate(report, REPORT)
    text = as_markdown(ABOUT, found)
    assert "## Errors in %, within 0.01" in text and "## Bytes of a token, within 0.3" in text


def test_a_report_of_what_is_no_number_is_json(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = decoder_of(tiny_checkpoint(1))
    with torch.no_grad():
        decoder.get_parameter("layers.2.attention.head_norms").fill_(math.nan)
    found = audit(decoder, [Document("en", tuple(range(3, 40)))], (0.01,))
    assert not found[0].held and found[0].failed and found[0].errors.excesses
    report = json.loads(json.dumps(as_json(ABOUT, found), allow_nan=False))
    jsonschema.validate(report, REPORT)
    assert report["audits"][0]["errors"]["worst"]["error"] is None
    assert "NO" in as_markdown(ABOUT, found)


def test_keys_made_of_values_count_against_the_models_own(
    tiny_checkpoint: TinyCheckpoint,
) -> None:
    config = ModelConfig.load(tiny_checkpoint(1))
    layer, tokens = config.layers[-1], 20
    weight = torch.rand(layer.head_dim) + 0.5
    rule = key_rule(layer, weight, tokens, torch.device("cpu"))
    format = KVFormat(layer.kv_heads, layer.head_dim, 8, layer.rope.pairs)
    value = torch.randn(tokens, layer.kv_heads, layer.head_dim)
    own = through_cache(value, value, format, rule, 0.01)
    assert not own.failed.any()
    count = LayerCount(5, format, 0.01)
    count.add(own, 0)
    # The values are near; that the model's key is another is seen, though the store cannot know.
    assert count.found.value.within == 1 and count.found.key.within < 0.1
    assert count.found.stored == "values"


def test_layers_that_share_keys_read_what_was_read_back(tiny_checkpoint: TinyCheckpoint) -> None:
    decoder = decoder_of(tiny_checkpoint(3))
    config, length = decoder.config, 19
    last = len(config.layers) - 1
    source = config.layers[last].kv_source
    layer = config.layers[source]
    assert source != last
    draw = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(length, heads, layer.head_dim, generator=draw)
        for heads in (layer.heads, layer.kv_heads, layer.kv_heads)
    )
    seen: list[Reading] = []
    storage = Storage.of(decoder, 0.3, length)
    narrow = NarrowAttention(config, length, storage, lambda _, own: seen.append(own))
    dense = DenseAttention(config, [length])
    narrow.attend(source, query, key, value)
    (own,) = seen
    dense.attend(source, query, *own.read)
    mixed = narrow.attend(last, query, None, None)
    assert torch.equal(mixed, dense.attend(last, query, None, None))
    exact = DenseAttention(config, [length])
    exact.attend(source, query, key, value)
    assert not torch.allclose(mixed, exact.attend(last, query, None, None), rtol=1e-3, atol=1e-3)
    assert len(seen) == 1


def run(command: str, *arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [command, *map(str, arguments)])


def test_compressed_checkpoints_are_audited(text_checkpoint: Path, tmp_path: Path) -> None:
    text, made = tmp_path / "text.txt", tmp_path / "made"
    text.write_text("\n\n".join(f"paragraph {number} of many" for number in range(12)))
    small = ("--sequences", "4", "--length", "16", "--format", "8:16-bf16", "--mode", "magnitude")
    asked = ("--text", text, "--device", "cpu")
    assert run("compress", text_checkpoint, made, *asked, *small).exit_code == 0
    both = [
        run("audit", folder, *asked, "--documents", "4", "--json")
        for folder in (made, text_checkpoint)
    ]
    reports = [json.loads(done.stdout) for done in both if done.exit_code == 0]
    (ours, theirs) = (report["audits"][0] for report in reports)
    assert ours["held"] and ours["bytes"] > 0 and ours["max_error"] == 0.01
    assert (
        ours["languages"][0]["original_perplexity"] != theirs["languages"][0]["original_perplexity"]
    )


def test_wrong_options_are_told(text_checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words")
    asked = (text_checkpoint, "--text", text, "--device", "cpu")
    for arguments, message in (
        (("--dtype", "int8"), "choose one of float32, bfloat16"),
        (("--max-error", "0.0001"), "must be 0.001 to 0.5"),
        (("--max-error", "nan"), "must be 0.001 to 0.5"),
        (("--device", "moon"), "cannot be used"),
    ):
        done = run("audit", *asked, *arguments)
        assert done.exit_code == 1 and message in " ".join(done.output.split())
    done = run("audit", tmp_path / "nowhere", "--text", text)
    assert done.exit_code == 1 and "error:" in done.output
