"""What is in the bundle of kernels, and does an engine that runs from it compile anything?

`make kernels` comes first. Without a GPU only the archive is counted. With one, engines answer from
the shipped models, their weights packed into several formats: one token at a time, many at a time
and prompts of all lengths, so that every way through the linear layers is taken; every launch of a
kernel is counted by where the kernel came from.
"""

import argparse
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from conclave.kernels.launching.launch import jit_count, launches, use_bundle
from conclave.kernels.launching.loader import PACKAGED, Bundle
from conclave.worker import Engine

from .records import FOLDER, write_headline, write_result
from .records import HEADLINE as HEADLINE_FILE

FORMATS = ("5:16-int4-g64", "dense-int4-g64", "dense-int8-g64", "5:16-bf16")
RUNS = (
    *(("debian-8m-dense", text) for text in FORMATS),
    *((name, None) for name in ("debian-8m", "debian-moe-8m", "debian-ple-8m")),
)
"""Models, and what their weights are packed in; None: as they are stored."""
PROMPTS = (1, 2, 3, 4, 7, 17, 60, 130, 250, 400)
"""Tokens of the prompts."""
console = Console(stderr=True)


def main() -> None:
    """Count, print, write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=PACKAGED, help="the archive to look at")
    parser.add_argument("--engines", action="store_true", help="only run engines from it")
    parser.add_argument("--dry", action="store_true", help="print only; write no result")
    parser.add_argument("--out", type=Path, help="a folder that gets a copy of what is written")
    options = parser.parse_args()
    if not options.bundle.exists():
        raise SystemExit(f"{options.bundle} does not exist; `make kernels` makes it")
    if not options.engines:
        tell(
            "bundle", {"bytes": options.bundle.stat().st_size, **contents(options.bundle)}, options
        )
    if torch.cuda.is_available():
        use_bundle(options.bundle)
        tell("bundle_engine", engines(), options)


def engines() -> dict[str, Any]:
    """One run after the other."""
    runs = [engine_run(model, text) for model, text in track(RUNS, "engines", console=console)]
    return {"engines": runs, "compiled_at_run_time": jit_count()}


def contents(path: Path) -> dict[str, Any]:
    """One row a target."""
    bundle, rows = Bundle(path), []
    for target in bundle.targets:
        entries = bundle.entries(target).values()
        rows.append(
            {
                "target": target,
                "kernels": len({entry.kernel for entry in entries}),
                "variants": len(entries),
                "spilling": sum(entry.spilled > 0 for entry in entries),
                "most_registers": max(entry.registers for entry in entries),
            }
        )
    return {"targets": rows}


def engine_run(model: str, text: str | None) -> dict[str, Any]:
    """One engine answers prompts alone, then all at once."""
    before, compiled = launches(), jit_count()
    draw = random.Random(0)
    folder = FOLDER.parent / "examples" / "models" / model
    with Engine(folder, device="cuda", weight_format=text, kv_tokens=16384) as engine:
        prompts = [[draw.randrange(10, 4000) for _ in range(length)] for length in PROMPTS]
        for batch in ([prompt] for prompt in prompts), [prompts], [prompts * 5]:
            for asked in batch:
                streams = [engine.stream(prompt, max_tokens=4, ignore_eos=True) for prompt in asked]
                tokens = [len(stream.result().token_ids) for stream in streams]
                assert tokens == [4] * len(asked)
    sources: dict[str, int] = {}
    for (_, source), count in (launches() - before).items():
        sources[source] = sources.get(source, 0) + count
    return {
        "model": model,
        "weights": text or "as stored",
        "launches_from_bundle": sources.pop("bundle", 0),
        "launches_from_elsewhere": sum(sources.values()),
        "compiled": jit_count() - compiled,
    }


def tell(name: str, figures: dict[str, Any], options: argparse.Namespace) -> None:
    """Print figures; write them, and the headline figure that is theirs, unless it is dry."""
    for key, rows in figures.items():
        for row in rows if isinstance(rows, list) else [rows]:
            print(key, row)
    if options.dry:
        return
    written = [write_result(name, figures), HEADLINE_FILE]
    if name == "bundle":
        count = len(figures["targets"])
        write_headline("bundle_targets", count, "count", (count, count))
    else:
        count = figures["compiled_at_run_time"]
        write_headline("bundle_jit_count", count, "count", (count, count))
    for path in written:
        print(f"written: {path}")
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, options.out)


if __name__ == "__main__":
    main()
