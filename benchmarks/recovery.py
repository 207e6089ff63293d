"""How good are the shipped models, compressed and recovered, against the best dense ones?

Trains first, as many jobs side by side as there are GPUs: `recover-NAME` compresses a model that
`examples.train_model train` has made (of the shipped ones but one is at hand) and trains what is
left, taught by all three; `control-NAME` trains a dense one afresh for as many tokens as both
trainings had, if there is time for them, as the original may be better with more. What became of it
is kept in `results/controls`, so that it is not trained again for every other way to recover. The
recovered ones, or those shipped (`WORK examples/models --judge`), are scored on all held-out
documents; a ratio is that of a recovered model's perplexity and the least of a dense one of its
shape. WORK is what `python -m examples.train_model corpus` and `encode` have made. Given up: more
than one seed.
"""

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from conclave.worker.compress.quality.report import stored_weights
from examples.debian_model.checkpoint import load_model
from examples.debian_model.corpus import HELD_OUT
from examples.debian_model.encoding import Encoded
from examples.debian_model.evaluation import read_evaluation
from examples.debian_model.files import RouteError, written_by
from examples.debian_model.scoring import score
from examples.debian_model.shapes import SHAPES

from .records import HEADLINE, RESULTS, write_headline, write_result

CONTROLS = RESULTS / "controls"
"""What is known of dense models that were trained longer, by name."""
EPOCHS = 28.0
"""Of recovery, at most: as many as there is time for."""
KINDS = {shape.compressed.name: kind for kind, shape in SHAPES.items() if shape.compressed}
AFTER = 40.0
"""Seconds that a job has for what comes before and after its training: a start, a last scoring."""
FEWEST = 2000
"""Held-out tokens of a language that is judged by itself."""
SECONDS = 570.0
console = Console(stderr=True)
Figures = Mapping[str, Mapping[str, float]]
"""By language, and `overall`: tokens, perplexity and more."""


@dataclass(frozen=True)
class Job:
    """One training."""

    name: str
    command: Sequence[str]


def main() -> None:
    """Train, judge, write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="folder with the encoded text")
    parser.add_argument("models", type=Path, help="folder for what is trained, or what was before")
    parser.add_argument("--job", action="append", help="train this one alone; repeatable")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="jobs end by then")
    parser.add_argument("--epochs", type=float, default=EPOCHS, help="of recovery, at most")
    parser.add_argument(
        "--also", action="append", default=[], help="one more option of `compress`; repeatable"
    )
    parser.add_argument("--judge", action="store_true", help="train nothing")
    parser.add_argument("--out", type=Path, help="a folder that gets a copy of what is written")
    options = parser.parse_args()
    if not options.judge:
        try:
            for kind in KINDS.values():
                written_by(f"train --shape {kind.value}", SHAPES[kind].folder)
        except RouteError as error:
            parser.error(str(error))
        jobs = jobs_of(options.work, options.models, options.epochs, options.also)
        chosen = [job for job in jobs if job.name in (options.job or [each.name for each in jobs])]
        if not chosen:
            parser.error(f"no such job; there are {', '.join(job.name for job in jobs)}")
        options.models.mkdir(parents=True, exist_ok=True)
        gpus = [str(index) for index in range(torch.cuda.device_count())] or [""]
        side_by_side(chosen, gpus, options.seconds, options.models)
    keep_controls(options.models)
    rows = judge(options.work, options.models)
    for row in rows:
        console.print_json(json.dumps(row))
    save(rows, options.out)


def jobs_of(work: Path, target: Path, epochs: float, also: Sequence[str] = ()) -> list[Job]:
    """Recoveries first, with the options that they take `also`."""
    route = (sys.executable, "-m", "examples.train_model")
    recoveries, controls = [], []
    originals = {name: SHAPES[kind].folder for name, kind in KINDS.items()}
    for name, kind in KINDS.items():
        teachers = [f"--teacher={own}" for other, own in originals.items() if other != name]
        more = f"--epochs={epochs}", f"--work={work}"
        recover = (
            *route,
            "compress",
            str(originals[name]),
            str(target / name),
            *more,
            *teachers,
            *also,
        )
        recoveries.append(Job(f"recover-{name}", recover))
        both = SHAPES[kind].recipe.epochs + epochs
        folder = target / f"control-{name}"
        train = (*route, "train", f"--shape={kind.value}", f"--work={work}")
        controls.append(Job(folder.name, (*train, f"--model={folder}", f"--epochs={both}")))
    return recoveries + controls


def side_by_side(jobs: Sequence[Job], gpus: Sequence[str], seconds: float, logs: Path) -> None:
    """Run jobs, one at a time on each GPU; those that are not done in time are ended.

    What a job prints is in `logs`/NAME.log, with how it ended.
    """
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    end = time.monotonic() + seconds

    def work(gpu: str) -> None:
        while not waiting.empty() and time.monotonic() < end:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            how = _run(job, gpu, end - time.monotonic(), logs / f"{job.name}.log")
            console.print(f"{job.name} on GPU {gpu or '(none)'}: {how}", markup=False)

    threads = [threading.Thread(target=work, args=(gpu,)) for gpu in gpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _run(job: Job, gpu: str, seconds: float, log: Path) -> str:
    """How it ended."""
    began = time.monotonic()
    with log.open("w") as file:
        try:
            done = subprocess.run(
                [*job.command, f"--minutes={max(0.0, seconds - AFTER) / 60}"],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu, "PYTHONUNBUFFERED": "1"},
                timeout=seconds,
            )
            how = "done" if done.returncode == 0 else f"failed, status {done.returncode}"
        except subprocess.TimeoutExpired:
            how = "ended, as its time was over"
        told = f"{how} after {time.monotonic() - began:.0f} s"
        file.write(told + "\n")
    return told


def keep_controls(folder: Path) -> None:
    """Note what became of the controls in a folder."""
    CONTROLS.mkdir(parents=True, exist_ok=True)
    for name in KINDS:
        evaluation = folder / f"control-{name}" / "evaluation.json"
        if evaluation.exists():
            shutil.copy(evaluation, CONTROLS / f"{name}.json")


def judge(work: Path, folder: Path) -> list[dict[str, Any]]:
    """A row for each recovered model that there is."""
    held_out = Encoded.load(work / f"{HELD_OUT}.npz")
    rows = []
    for name in KINDS:
        if not (folder / name / "conclave.json").exists():
            continue
        evaluation = read_evaluation(folder / name)
        dense = {"original": evaluation["original"]["heldout"]}
        control = CONTROLS / f"{name}.json"
        if control.exists():
            dense["control"] = json.loads(control.read_text())["heldout"]
        recovered = _scored(folder / name, held_out)
        weights = [each for each in stored_weights(folder / name) if each.layer is not None]
        row = verdict(name, recovered, evaluation["one_shot"], dense)
        pruned = sum(each.weights * each.sparsity for each in weights)
        rows.append(row | {"pruned": pruned, "weights": sum(each.weights for each in weights)})
    return rows


def _scored(folder: Path, held_out: Encoded) -> Figures:
    """Of a compressed checkpoint, in float32."""
    device, budget = ("cuda", 65_536) if torch.cuda.is_available() else ("cpu", 4_096)
    scores = score(load_model(folder).to(device), held_out, budget)
    return {language: own.figures() for language, own in scores.items()}


def verdict(
    name: str, recovered: Figures, one_shot: Figures, dense: Mapping[str, Figures]
) -> dict[str, Any]:
    """Perplexities, and their ratios to those of the dense model that is best overall."""
    best = min(dense, key=lambda each: dense[each]["overall"]["perplexity"])
    ratios = {
        language: own["perplexity"] / dense[best][language]["perplexity"]
        for language, own in recovered.items()
        if own["tokens"] >= FEWEST or language == "overall"
    }
    worst = max((each for each in ratios if each != "overall"), key=ratios.__getitem__, default="")
    return {
        "model": name,
        "perplexity": recovered["overall"]["perplexity"],
        "one_shot_perplexity": one_shot["overall"]["perplexity"],
        "dense_perplexity": {each: own["overall"]["perplexity"] for each, own in dense.items()},
        "best_dense": best,
        "ratio": ratios["overall"],
        "ratio_by_language": ratios,
        "worst_language": worst,
    }


def save(rows: Sequence[dict[str, Any]], out: Path | None) -> None:
    """Write the rows, and the headline figures if no model and no control is missing."""
    path = write_result("recovery", {"models": list(rows)})
    whole = len(rows) == len(KINDS) and all(len(row["dense_perplexity"]) == 2 for row in rows)
    if whole:
        ratios = [row["ratio"] for row in rows]
        write_headline("ppl_ratio", max(ratios), "ratio", (min(ratios), max(ratios)))
        worst = [row["ratio_by_language"][row["worst_language"]] for row in rows]
        write_headline("ppl_ratio_worst_language", max(worst), "ratio", (min(worst), max(worst)))
        shares = [row["pruned"] / row["weights"] for row in rows]
        average = sum(row["pruned"] for row in rows) / sum(row["weights"] for row in rows)
        write_headline("sparsity_average", average, "fraction", (min(shares), max(shares)))
    else:
        console.print("no headline figures: a recovered model or a control is missing")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for each in (path, HEADLINE):
            shutil.copy(each, out)


if __name__ == "__main__":
    main()
