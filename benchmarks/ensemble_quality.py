"""Do ensembles of the three shipped models earn their keep on held-out text?

`fuse`: perplexity of the references, token by token, under the members' combined distribution, for
the mean and the product, over whole vocabularies and over the union of 64 candidates as served. The
served arithmetic (`combine`) is checked against it on every document. `cascade`: each prompt is
answered by the cheap member; its own confidence decides who answers, and quality is the perplexity
of the reference under whoever does. Intervals are bootstrapped over documents. CPU, float32.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from rich.progress import track

from conclave.orchestrator.ensemble.combining import Told, combine
from conclave.worker import Engine
from conclave.worker.model.decoder import DenseAttention

from .records import write_headline, write_result

MODELS = Path(__file__).parent.parent / "examples" / "models"
NAMES = ("debian-8m", "debian-moe-8m", "debian-ple-8m")
HELDOUT = MODELS / "debian-8m-dense" / "heldout.jsonl"
CANDIDATES = 64
ANSWER_TOKENS = 48
CHEAP, BIG = "debian-ple-8m", "debian-8m"
WITHIN = 1.01
RESAMPLES = 1000

Losses = NDArray[numpy.float64]


def main() -> None:
    """Run all measurements and write them down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--dry", action="store_true", help="print only; write no result")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    engines = {name: Engine(MODELS / name, device="cpu") for name in NAMES}
    try:
        figures, ratio = measure(engines, documents(options.documents))
    finally:
        for engine in engines.values():
            engine.close()
    print(json.dumps(figures, indent=2))
    if not options.dry:
        print(f"written: {write_result('ensemble_quality', figures)}")
        write_headline("fuse_ppl_ratio", ratio["value"], "ratio", (ratio["low"], ratio["high"]))


@dataclass(frozen=True)
class Document:
    """A prompt and its reference."""

    prompt: str
    text: str


def documents(count: int) -> list[Document]:
    """Evenly from all languages of the held-out sample."""
    lines = HELDOUT.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:: max(1, len(lines) // count)]][:count]
    return [Document(row["prompt"], row["text"]) for row in rows]


def measure(
    engines: dict[str, Engine], sample: list[Document]
) -> tuple[dict[str, Any], dict[str, float]]:
    """All figures, and the headline's ratio."""
    tokenizer = engines[BIG].model.tokenizer
    ends = [next(iter(tokenizer.stop_ids))]
    ways = [*NAMES, "mean", "product", "mean, 64 candidates"]
    losses: dict[str, list[Losses]] = {way: [] for way in ways}
    agreements: list[float] = []
    for document in track(sample, "references"):
        prompt = tokenizer.encode(document.prompt)
        ids = prompt + tokenizer.encode(document.text, special=False) + ends
        logprobs = torch.stack([of(engine, ids, len(prompt)) for engine in engines.values()])
        for way, loss in document_losses(logprobs, ids[len(prompt) :]).items():
            losses[way].append(loss)
        agreements.append(check_served(logprobs))
    cascade = measure_cascade(engines, sample, losses)
    figures: dict[str, Any] = {
        "documents": len(sample),
        "tokens": int(sum(len(loss) for loss in losses[BIG])),
        "perplexity": [{"way": way, **interval(losses[way])} for way in ways],
        "largest_difference_to_served": max(agreements),
        "cascade": cascade,
    }
    best = min(NAMES, key=lambda name: perplexity(losses[name]))
    ratio = paired_ratio(losses["mean"], losses[best])
    figures["fuse_over_best"] = {"best": best, **ratio}
    shipped = MODELS / "ensembles.json"
    if shipped.exists():
        figures["whole held-out set, and a single model of equal cost"] = json.loads(
            shipped.read_text()
        )
    return figures, ratio


def of(engine: Engine, ids: list[int], start: int) -> torch.Tensor:
    """Log-probabilities [tokens from `start`, vocabulary], float64, of one model."""
    decoder = engine.model.runner.decoder
    attention = DenseAttention(decoder.config, [len(ids) - 1])
    hidden = decoder(torch.tensor(ids[:-1]), torch.arange(len(ids) - 1), attention)
    logits = decoder.logits(hidden[start - 1 :])[:, : engine.model.vocabulary]
    return logits.double().log_softmax(-1)


def document_losses(logprobs: torch.Tensor, targets: list[int]) -> dict[str, Losses]:
    """Negative log-likelihoods of the targets, of `logprobs` [models, tokens, vocabulary]."""
    index = torch.tensor(targets)[:, None]
    share = math.log(len(logprobs))
    mean = logprobs.logsumexp(0) - share
    product = logprobs.mean(0).log_softmax(-1)
    served = spread(logprobs).logsumexp(0) - share
    rows = dict(zip(NAMES, logprobs, strict=True))
    rows |= {"mean": mean, "product": product, "mean, 64 candidates": served}
    return {way: -row.gather(1, index)[:, 0].numpy() for way, row in rows.items()}


def spread(logprobs: torch.Tensor) -> torch.Tensor:
    """What a member's 64 candidates tell: the rest of its mass evenly on all other tokens."""
    best = logprobs.topk(CANDIDATES, dim=-1)
    unnamed = logprobs.shape[-1] - CANDIDATES
    rest = (1 - best.values.exp().sum(-1, keepdim=True)).clamp_min(1e-30) / unnamed
    floor = torch.minimum(rest.log(), best.values[..., -1:])
    return floor.expand_as(logprobs).scatter(-1, best.indices, best.values)


def check_served(logprobs: torch.Tensor) -> float:
    """The largest difference of the gateway's own arithmetic to the same over whole vocabularies,
    among the likeliest tokens of a document's first position.
    """
    vocabulary = logprobs.shape[-1]
    rows = [row[0].sort(descending=True) for row in logprobs]
    fused = combine([Told(r.indices.tolist(), r.values.tolist(), vocabulary) for r in rows])
    mean = logprobs[:, 0].exp().mean(0)
    likeliest = zip(fused.ids[:100], fused.probabilities[:100], strict=True)
    return max(abs(float(mean[token]) - probability) for token, probability in likeliest)


def measure_cascade(
    engines: dict[str, Engine], sample: list[Document], losses: dict[str, list[Losses]]
) -> dict[str, Any]:
    """The highest share of prompts that the cheap member may keep within 1 % of the big one."""
    sure = [confidence(engines[CHEAP], each.prompt) for each in track(sample, "cascade")]
    order = numpy.argsort(sure)[::-1]
    big = perplexity(losses[BIG])
    kept = 0
    for count in range(1, len(sample) + 1):
        chosen = set(order[:count].tolist())
        if perplexity(mixed(losses, chosen)) <= WITHIN * big:
            kept = count
    chosen = set(order[:kept].tolist())
    tokens = [len(loss) for loss in losses[BIG]]
    random = numpy.random.default_rng(0).permutation(len(sample))[:kept].tolist()
    return {
        "cheap": CHEAP,
        "big": BIG,
        "threshold_mean_logprob": float(sure[order[kept - 1]]) if kept else 0.0,
        "kept_by_cheap": kept / len(sample),
        "big_tokens_saved": sum(tokens[i] for i in chosen) / sum(tokens),
        "perplexity": perplexity(mixed(losses, chosen)),
        "perplexity_big": big,
        "perplexity_cheap": perplexity(losses[CHEAP]),
        "perplexity_same_share_at_random": perplexity(mixed(losses, set(random))),
    }


def confidence(engine: Engine, prompt: str) -> float:
    """Mean log-probability a token of the greedy answer: what `cascade` goes by."""
    answer = engine.generate(prompt, temperature=0.0, max_tokens=ANSWER_TOKENS, logprobs=0)
    known = [token.logprob for token in answer.outputs[0].tokens if token.logprob is not None]
    return sum(known) / max(1, len(known))


def mixed(losses: dict[str, list[Losses]], cheap: set[int]) -> list[Losses]:
    """Each document's losses under whoever answers it."""
    pairs = zip(losses[CHEAP], losses[BIG], strict=True)
    return [a if index in cheap else b for index, (a, b) in enumerate(pairs)]


def perplexity(losses: list[Losses]) -> float:
    """Over all tokens."""
    return math.exp(sum(loss.sum() for loss in losses) / sum(len(loss) for loss in losses))


def interval(losses: list[Losses]) -> dict[str, float]:
    """Perplexity with its 95 % interval."""
    values = resampled(losses)
    return {
        "perplexity": perplexity(losses),
        "low": float(numpy.quantile(values, 0.025)),
        "high": float(numpy.quantile(values, 0.975)),
    }


def paired_ratio(ours: list[Losses], other: list[Losses]) -> dict[str, float]:
    """Perplexity over perplexity on the same documents, with its 95 % interval."""
    values = resampled(ours) / resampled(other)
    return {
        "value": perplexity(ours) / perplexity(other),
        "low": float(numpy.quantile(values, 0.025)),
        "high": float(numpy.quantile(values, 0.975)),
    }


def resampled(losses: list[Losses]) -> Losses:
    """Perplexities of bootstrap samples of the documents; the same samples for every model."""
    sums = numpy.array([loss.sum() for loss in losses])
    counts = numpy.array([len(loss) for loss in losses])
    draws = numpy.random.default_rng(0).integers(len(losses), size=(RESAMPLES, len(losses)))
    return numpy.asarray(numpy.exp(sums[draws].sum(1) / counts[draws].sum(1)))


if __name__ == "__main__":
    main()
