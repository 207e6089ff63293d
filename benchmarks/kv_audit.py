"""Whether keys and values in narrow numbers are as near as promised, and what they save.

`conclave audit` on the three shipped models and the same number of held-out documents of each
language; and on one full and one sliding layer of the 31B model's shape, whose keys and values are
drawn: each number of a projection from a Student t distribution with 3 degrees of freedom, every
128th channel of a head 16 times as large, then normed, weighted (k_norm's weight is log-normal, of
deviation 0.3) and turned by RoPE as the decoder does. Bytes count codes, scales, indices and second
digits. Tokens a GiB are those of one sequence of 32,768 that decodes: sliding layers keep their
window and the block that is written, and the pool of second digits is all that an engine makes room
for; beside it those of one whose prompt is computed, with a chunk of 512 in every layer. Headline
figures are of float32; the drawn layers are audited in bfloat16 too, where keys that are made of
values are not held to the key that the model itself has rounded. What it gave up: real activations
of a large model.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from conclave.kernels.attention.cache import KVFormat
from conclave.worker.audit.findings import Finding, LayerCount, finding
from conclave.worker.audit.reading import audit
from conclave.worker.audit.storing import through_cache
from conclave.worker.compress.calibration import Text, read_texts
from conclave.worker.compress.console import progress
from conclave.worker.compress.quality.reading import as_documents, load_unpacked
from conclave.worker.model.config import CacheGroup, ModelConfig, cache_groups
from conclave.worker.model.layers import Rotations, rotate
from conclave.worker.model.norms import rms_norm
from conclave.worker.narrow import key_rule, kv_formats, second_share
from conclave.worker.text.tokenizer import Tokenizer

from .compression import CONFIG
from .records import FOLDER, write_headline, write_result

MODELS = FOLDER.parent / "examples" / "models"
NAMES = ("debian-8m", "debian-ple-8m", "debian-moe-8m")
HELDOUT = MODELS / "debian-8m-dense" / "heldout.jsonl"
MAX_ERRORS = (0.005, 0.01, 0.03, 0.12)
PROMISED = 0.01
"""Of the headline figures."""
DRAWN = "31B, drawn"
LENGTH = 1024
CONTEXT, BLOCK, CHUNK = 32_768, 16, 512
DRAWN_TOKENS = 4096
FREEDOM, EVERY, OUTLYING, DEVIATION = 3, 128, 16.0, 0.3
"""The distribution that numbers are drawn from."""
console = Console(stderr=True)


def main() -> None:
    """Audit everything and write it down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=6, help="of each language")
    parser.add_argument("--tokens", type=int, default=DRAWN_TOKENS, help="that are drawn")
    parser.add_argument("--dry", action="store_true", help="print only; write no result")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    found = {name: shipped(name, options.documents, device) for name in NAMES}
    config = ModelConfig.parse(shape_of_31b())
    savings = [each.saving for own in found.values() for each in promised(own)]
    found[DRAWN] = drawn(config, options.tokens, device)
    within = [each.errors.within for own in found.values() for each in promised(own)]
    room = [tokens_per_gib(config, each) for each in MAX_ERRORS]
    figures = {
        "documents_of_a_language": options.documents,
        "audits": [audit_row(name, each) for name, own in found.items() for each in own],
        "groups": [
            row for name, own in found.items() for each in own for row in groups(name, each)
        ],
        "layers": [row for name, own in found.items() for row in layers(name, promised(own))],
        "excesses": [
            row for name, own in found.items() for each in own for row in above(name, each)
        ],
        "drawn_in_bfloat16": [
            audit_row(DRAWN, each) for each in drawn(config, options.tokens, device, torch.bfloat16)
        ],
        "tokens_per_gib_31b": room,
    }
    console.print_json(json.dumps(figures))
    if options.dry:
        return
    write_result("kv_audit", figures)
    # Rounded down, so that one vector too far off shows.
    low, high = (math.floor(own * 1e4) / 1e4 for own in (min(within), max(within)))
    write_headline("within_error", low, "fraction", (low, high))
    write_headline("kv_saving", min(savings), "fraction", (min(savings), max(savings)))
    (ratio,) = (own["over_bf16"] for own in room if own["max_error"] == PROMISED)
    write_headline("kv_tokens_per_gib", ratio, "ratio", (ratio, ratio))


def promised(found: Sequence[Finding]) -> list[Finding]:
    """Those of the headline figures."""
    return [each for each in found if each.max_error == PROMISED]


def shipped(name: str, documents: int, device: torch.device) -> list[Finding]:
    """A model of examples/models."""
    chosen = of_each_language(read_texts(HELDOUT), documents)
    sample = as_documents(chosen, Tokenizer(MODELS / name), LENGTH)
    with progress(name) as told:
        return audit(load_unpacked(MODELS / name, device), sample, MAX_ERRORS, told)


def of_each_language(texts: Sequence[Text], count: int) -> list[Text]:
    """The first so many of each."""
    seen: dict[str, int] = {}
    chosen = []
    for text in texts:
        seen[text.language] = seen.get(text.language, 0) + 1
        if seen[text.language] <= count:
            chosen.append(text)
    return chosen


def shape_of_31b() -> dict[str, Any]:
    """Its config.json, as far as keys and values go."""
    pattern = ["sliding_attention"] * 5 + ["full_attention"]
    return CONFIG | {"num_hidden_layers": 60, "layer_types": pattern * 10}


def drawn(
    config: ModelConfig, tokens: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> list[Finding]:
    """The first sliding and the first full layer of the 31B model's shape."""
    groups = cache_groups(config)
    weights = norm_weights(config)
    chosen = [replace(group, layers=group.layers[:1]) for group in groups]
    made = {group.layers[0]: heads_of(config, group.layers[0], weights, tokens) for group in chosen}
    found = []
    for max_error in MAX_ERRORS:
        counts = {}
        for group, format in zip(
            chosen, kv_formats(config, groups, max_error, weights), strict=True
        ):
            index = group.layers[0]
            key, value = (own.to(device, dtype) for own in made[index])
            counts[index] = LayerCount(index, format, max_error)
            rule = None
            if format.pairs is not None:
                rule = key_rule(config.layers[index], weights[index], tokens, device)
            counts[index].add(through_cache(key, value, format, rule, max_error), 0)
        found.append(finding(chosen, counts, []))
    return found


def norm_weights(config: ModelConfig) -> dict[int, Tensor]:
    """k_norm's of the layers whose keys are made of values."""
    draw = torch.Generator().manual_seed(1)
    return {
        index: (torch.randn(layer.head_dim, generator=draw) * DEVIATION).exp()
        for index, layer in enumerate(config.layers)
        if not layer.has_value_projection
    }


def heads_of(
    config: ModelConfig, index: int, weights: dict[int, Tensor], tokens: int
) -> tuple[Tensor, Tensor]:
    """A layer's keys and values, float32 [tokens, kv_heads, head_dim] each."""
    layer, draw = config.layers[index], torch.Generator().manual_seed(2 + index)
    shape = (tokens, layer.kv_heads, layer.head_dim)
    raw = heavy_tailed(shape, draw)
    normed = rms_norm(raw, None, config.norm_epsilon)
    value = rms_norm(heavy_tailed(shape, draw), None, config.norm_epsilon)
    if not layer.has_value_projection:
        value = normed
    rotation = Rotations(config)(torch.arange(tokens))[index]
    weight = weights.get(index, (torch.randn(layer.head_dim, generator=draw) * DEVIATION).exp())
    return rotate(normed * weight, rotation), value


def heavy_tailed(shape: tuple[int, int, int], draw: torch.Generator) -> Tensor:
    """Student t, some channels larger than others; float32."""
    freedom = torch.zeros(shape)
    for _ in range(FREEDOM):
        freedom += torch.randn(shape, generator=draw).square_()
    numbers = torch.randn(shape, generator=draw) / (freedom / FREEDOM).sqrt_()
    numbers[..., ::EVERY] *= OUTLYING
    return numbers


def tokens_per_gib(config: ModelConfig, max_error: float) -> dict[str, Any]:
    """Of one sequence of `CONTEXT` tokens, and how many times those of bfloat16."""
    found = cache_groups(config)
    formats = kv_formats(config, found, max_error, norm_weights(config))
    sizes = []
    for more in (BLOCK, CHUNK):
        narrow = plain = 0
        for group, format in zip(found, formats, strict=True):
            tokens = CONTEXT if group.window is None else group.window + more
            narrow += cached_bytes(group, format, tokens, second_share(format, max_error))
            plain += tokens * group.bytes_per_token(2)
        sizes.append((narrow, plain))
    (narrow, plain), in_a_prompt = sizes
    return {
        "max_error": max_error,
        "tokens": round(2**30 * CONTEXT / narrow),
        "tokens_in_bf16": round(2**30 * CONTEXT / plain),
        "over_bf16": plain / narrow,
        "over_bf16_in_a_prompt": in_a_prompt[1] / in_a_prompt[0],
    }


def cached_bytes(group: CacheGroup, format: KVFormat, tokens: int, share: float) -> int:
    """All that a group's layers take, with the pool and its list of free rows."""
    heads = len(group.layers) * tokens * format.kv_heads
    rows = math.ceil(share * heads)
    return len(group.layers) * tokens * format.token_bytes + rows * (format.row_bytes + 4)


def audit_row(name: str, each: Finding) -> dict[str, Any]:
    """One model at one error."""
    overall = each.languages[0] if each.languages else None
    return {
        "model": name,
        "max_error": each.max_error,
        "held": each.held,
        "vectors": each.errors.vectors,
        "above": each.errors.above,
        "worst": each.errors.worst.error if each.errors.worst else None,
        "two_digits": each.second,
        "failed": each.failed,
        "rows_lacking": each.short,
        "bytes_a_token": each.bytes,
        "bf16": each.plain_bytes,
        "saved": each.saving,
        "kl_nats": overall.divergence if overall else None,
        "same_first": overall.agreement if overall else None,
        "perplexity_ratio": overall.ratio if overall else None,
    }


def groups(name: str, each: Finding) -> Iterator[dict[str, Any]]:
    """What the layers of each window take."""
    for own in each.groups:
        yield {
            "model": name,
            "max_error": each.max_error,
            "window": own.window,
            "stored": own.format,
            "bytes_a_token": own.bytes,
            "saved": own.saving,
            "rows_share": own.share,
            "most_in_a_document": own.most,
            "room": own.allotted,
        }


def layers(name: str, found: Sequence[Finding]) -> Iterator[dict[str, Any]]:
    """How errors are distributed, in each layer."""
    for each in found:
        for layer in each.layers:
            for side, errors in (("key", layer.key), ("value", layer.value)):
                worst = errors.worst.error if errors.worst else None
                percentiles = {f"p{place}": own for place, own in errors.percentiles.items()}
                about = {"model": name, "layer": layer.layer, "of": side}
                yield {**about, **percentiles, "worst": worst, "two_digits": layer.second}


def above(name: str, each: Finding) -> Iterator[dict[str, Any]]:
    """The first that are too far off, if there are any."""
    for place in each.errors.excesses:
        about = {"model": name, "max_error": each.max_error, "layer": place.layer}
        over = place.error / each.max_error - 1
        yield {**about, "of": place.side, "error": place.error, "over_by": over}


if __name__ == "__main__":
    main()
