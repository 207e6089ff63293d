"""What compressing a 31B-shaped model takes: device memory, time a layer, and being killed.

A checkpoint with the real sizes of the 31B model but four layers (three sliding, one full), its
weights random: memory and time do not depend on values. It is compressed once in one go, each layer
timed, and twice at once while it is killed at ten random points in all and gone on with; all must
have the same bytes. Kills come after up to a third of the whole time: most interrupt some layer.
Memory is what the driver counts for the whole device, less what was taken before. Torch is held to
what a card of 24 GiB leaves it, as it keeps what is free again for as long as there is room.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file

from conclave.kernels.formats import Format
from conclave.worker.compress.layerwise import compress_checkpoint
from conclave.worker.compress.recipe import Recipe
from conclave.worker.model.config import ModelConfig
from conclave.worker.weights import tensor_map
from examples.debian_model.architecture import CONFIG as SMALL

from .records import FOLDER, write_headline, write_result
from .records import HEADLINE as HEADLINE_FILE

LAYERS = 60
"""Of the real model."""
CONFIG: dict[str, Any] = SMALL | {
    "global_head_dim": 512,
    "head_dim": 256,
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_global_key_value_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 16,
    "sliding_window": 1024,
    "vocab_size": 262144,
}
TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "vocab_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 32,
    "global_head_dim": 64,
}
"""Sizes for a dry run."""
FORMAT = "5:16-int4-g128"
SEQUENCES, LENGTH = 128, 512
"""The command's own defaults."""
KILLS, AT_ONCE = 10, 2
CARD_GIB, CONTEXT_GIB = 24.0, 1.0
"""Of the card it shall run on, and what torch does not count of it: the driver's, libraries'."""
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as the command
console = Console(stderr=True)


def main() -> None:
    """Make, compress, kill, compare, write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="tiny sizes; write no result")
    parser.add_argument(
        "--kills", type=int, default=KILLS, help="of the second run; 0: no second run"
    )
    parser.add_argument("--out", type=Path, help="a folder that gets a copy of what is written")
    parser.add_argument("--run", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print("begun", flush=True)
        compress(*options.run)
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        make(source, CONFIG | (TINY if options.dry else {}))
        figures = measure(source, Path(folder), options.kills)
    console.print_json(json.dumps(figures))
    if options.dry:
        return
    write_result("compression", figures)
    if (peak := figures["peak_gib"]) is not None:
        write_headline("compress_peak_gib", peak, "GiB", (peak, peak))
    if options.out:
        shutil.copy(FOLDER / "results" / "compression.json", options.out)
        shutil.copy(HEADLINE_FILE, options.out)


def make(folder: Path, config: dict[str, Any]) -> None:
    """A checkpoint with random weights, a file for each layer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    files: dict[str, dict[str, torch.Tensor]] = {}
    draw = torch.Generator().manual_seed(1)
    for name, target in tensor_map(ModelConfig.load(folder)).items():
        part = name.split(".")[1] if name.startswith("layers.") else "rest"
        weight = torch.empty(target.shape, dtype=torch.bfloat16)
        if weight.dim() == 1:
            weight.uniform_(0.5, 1.5, generator=draw)
        else:
            weight.normal_(std=weight.shape[-1] ** -0.5, generator=draw)
        files.setdefault(f"model-{part}.safetensors", {})[f"model.{name}"] = weight
    index = {name: file for file, tensors in files.items() for name in tensors}
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def compress(source: Path, target: Path) -> list[float]:
    """The seconds at which each layer was finished, from the start."""
    config = ModelConfig.load(source)
    draw = torch.Generator().manual_seed(2)
    count, length = (SEQUENCES, LENGTH) if config.vocab_size > 1000 else (8, 64)
    tokens = torch.randint(3, config.vocab_size, (count, length), generator=draw)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        share = (CARD_GIB - CONTEXT_GIB) * 2**30 / torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    recipe = Recipe(Format.parse(FORMAT), "sparsegpt", embeddings=Format.parse("dense-int8-g64"))
    started, done = time.perf_counter(), [0.0]

    def told(finished: int, count: int) -> None:
        done.append(time.perf_counter() - started)
        console.print(f"{finished} of {count} after {done[-1]:.1f} s", style="dim")

    compress_checkpoint(source, target, recipe, tokens, device, {}, told)
    done.append(time.perf_counter() - started)
    return done


def measure(source: Path, folder: Path, kills: int) -> dict[str, Any]:
    """One run in one go, one that is killed, and whether they are alike."""
    with Watch() as watch:
        done = compress(source, folder / "whole")
    layers = [later - earlier for earlier, later in pairwise(done)][:-1]
    console.print(f"peak {watch.peak_gib} GiB")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        shares = [kills // AT_ONCE + (number < kills % AT_ONCE) for number in range(AT_ONCE)]
        folders = [folder / f"killed-{number}" for number, share in enumerate(shares) if share]
        runs = [
            pool.submit(kill_and_go_on, source, target, share, done[-1] / 3, number)
            for number, (target, share) in enumerate(zip(folders, shares, strict=False))
        ]
        killed = sum(run.result() for run in runs)
    whole = digests(folder / "whole")
    return {
        "what": "31B-shaped, random weights, 3 sliding layers and 1 full one",
        "format": FORMAT,
        "calibration": [SEQUENCES, LENGTH],
        "peak_gib": watch.peak_gib,
        "seconds_a_layer": [round(each, 2) for each in layers],
        "seconds_of_the_rest": round(done[-1] - done[-2], 2),
        "hours_of_60_layers": round(LAYERS * sum(layers) / len(layers) / 3600, 3),
        "killed": killed,
        "same_bytes": all(digests(target) == whole for target in folders) if folders else None,
    }


def kill_and_go_on(source: Path, target: Path, kills: int, patience: float, seed: int) -> int:
    """Compress in other processes, so many of which are killed within `patience` seconds."""
    draw, killed = random.Random(seed), 0
    command = (sys.executable, "-m", "benchmarks.compression", "--run", str(source), str(target))
    while not (target / "conclave.json").exists():
        run = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert run.stdout is not None
        run.stdout.readline()
        try:
            run.wait(draw.uniform(0, patience) if killed < kills else None)
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
            killed += 1
            continue
        if run.returncode:
            raise SystemExit(f"the run that was killed {killed} times ended in an error")
    return killed


def digests(folder: Path) -> dict[str, str]:
    """Of every file."""
    return {
        path.name: hashlib.file_digest(path.open("rb"), "sha256").hexdigest()
        for path in sorted(folder.iterdir())
    }


class Watch:
    """The most device memory that was taken while it was on, all processes and the driver's own."""

    def __init__(self) -> None:
        self.peak_gib: float | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Watch":
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            self._before = total - free
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _look(self) -> None:
        most = 0
        while not self._end.wait(0.01):
            free, total = torch.cuda.mem_get_info()
            most = max(most, total - free - self._before)
            self.peak_gib = round(most / 2**30, 3)


if __name__ == "__main__":
    main()
