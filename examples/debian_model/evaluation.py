"""The evaluation: every figure of a model, with where, when and by which command it was made.

Given up: error bars; figures of small languages are noise, as the card says.
"""

from __future__ import annotations

import datetime
import json
import platform
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from .checkpoint import load_model
from .corpus import HELD_OUT, TRAINING, VALIDATION
from .encoding import Encoded, encode_documents
from .files import write_json, written_by
from .sample import read_sample
from .scoring import perplexities, score
from .training import Trainer

FILE_NAME = "evaluation.json"
ROOT = Path(__file__).parents[2]
SPOT_CHECK_STEP = 76  # leaves 21 of the sample's documents, for tests


def final_evaluation(trainer: Trainer, splits: dict[str, Encoded]) -> dict[str, Any]:
    """All figures of a finished run; the model is left with its rounded weights."""
    budget = 65_536 if trainer.device.type == "cuda" else 4_096
    model = trainer.model.eval()
    master = score(model, splits[HELD_OUT], budget)
    round_weights(model)
    held_out = score(model, splits[HELD_OUT], budget)
    watched = {
        "training (4,000 of the documents)": splits[TRAINING].spread(4_000),
        "validation (chose the checkpoint)": splits[VALIDATION],
    }
    overview = {name: score(model, part, budget)["overall"] for name, part in watched.items()}
    overview["held out, as saved (bfloat16 weights)"] = held_out["overall"]
    overview["held out, before rounding (float32 weights)"] = master["overall"]
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "overview": {name: value.figures() for name, value in overview.items()},
        "heldout": perplexities(held_out),
        "training": training_record(trainer, len(splits[TRAINING].tokens)),
    }


def compressed_evaluation(
    one_shot: Path, original: Path, recovered: Path, held_out: Encoded, device: torch.device
) -> dict[str, Any]:
    """Figures of what compression has made, in float32, beside those of its original."""
    budget = 65_536 if device.type == "cuda" else 4_096
    found = {
        name: perplexities(score(load_model(folder).to(device), held_out, budget))
        for name, folder in (("heldout", recovered), ("one_shot", one_shot))
    }
    return {**circumstances(device), **found, "original": read_evaluation(original)}


def round_weights(model: torch.nn.Module) -> None:
    """Leave the model with what its file can hold."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(torch.bfloat16))


def training_record(trainer: Trainer, corpus_tokens: int) -> dict[str, Any]:
    """What was run, on what, for how long, and how the losses went."""
    last = trainer.history[-1]
    return {
        **circumstances(trainer.device),
        "recipe": asdict(trainer.recipe),
        "compiled": trainer.compiled,
        "seconds": round(trainer.seconds, 1),
        "steps": last["step"],
        "tokens": last["tokens"],
        "corpus_tokens": corpus_tokens,
        "epochs": round(last["tokens"] / corpus_tokens, 2),
        "history": trainer.history,
    }


def circumstances(device: torch.device) -> dict[str, Any]:
    """Where and when a figure was made, and by which command, with paths from the root."""
    arguments = " ".join(shlex.quote(each.replace(f"{ROOT}/", "")) for each in sys.argv[1:])
    return {
        "command": f"python -m examples.train_model {arguments}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device_name(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


def device_name(device: torch.device) -> str:
    on_gpu = device.type == "cuda"
    return torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU"


def read_evaluation(model: Path) -> dict[str, Any]:
    """The figures that `train` wrote beside the checkpoint."""
    path = written_by("train", model / FILE_NAME)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write_evaluation(model: Path, evaluation: dict[str, Any]) -> None:
    write_json(model / FILE_NAME, evaluation)


def sample_record(model: Path) -> dict[str, Any]:
    """Figures of the shipped held-out sample, in float32 on the CPU."""
    documents = read_sample(model)
    loaded = load_model(model)
    started = time.perf_counter()
    figures = perplexities(score(loaded, encode_documents(documents, model), 4_096))
    seconds = round(time.perf_counter() - started, 1)
    few = score(loaded, encode_documents(documents[::SPOT_CHECK_STEP], model), 4_096)["overall"]
    spot_check = {"every": SPOT_CHECK_STEP, **few.figures()}
    where = circumstances(torch.device("cpu"))
    return {**where, "seconds": seconds, "figures": figures, "spot_check": spot_check}
