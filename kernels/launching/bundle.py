"""Builds the bundle: every variant of every kernel for every target, without a GPU.

    python -m conclave.kernels.launching.bundle --targets sm_90,gfx1100 --out build --json

The same sources, Triton and zlib make the same bytes. What was compiled before is kept in
`build/kernels`, by the sha256 of the source, the variant, the target and Triton's version.
"""

import hashlib
import importlib
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import triton
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..errors import BundleError
from .loader import FORMAT, PACKAGED, Bundle, Entry
from .targets import ALL, AMD, NVIDIA, Target, ptx_for
from .variant import Variant, compile_variant, resources

KEPT = Path("build/kernels")
_DATE = (1980, 1, 1, 0, 0, 0)
"""The oldest that a zip archive knows; a real one would make every build another."""
_GROUPS = {"all": ALL, "nvidia": NVIDIA, "amd": AMD}

Progressed = Callable[[int, int], None]
"""(variants compiled, variants to compile)"""


@dataclass(frozen=True, slots=True)
class Job:
    """One variant to compile for one target; what comes of it is kept in `folder`."""

    variant: Variant
    target: Target
    folder: Path

    @property
    def stem(self) -> Path:
        """Of the kept files, named by the sha256 of all that their bytes come from."""
        source = self.variant.kernel.source_hash
        parts = (FORMAT, triton.__version__, self.target.name, str(self.variant), source)
        return self.folder / hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def entry(self) -> Entry | None:
        """What the manifest says of it, once it is compiled."""
        path = self.stem.with_suffix(".json")
        return Entry(**json.loads(path.read_text())) if path.exists() else None

    def __str__(self) -> str:
        return f"{self.variant} for {self.target.name}"


@dataclass(frozen=True, slots=True)
class Summary:
    """What a build made for one target."""

    target: str
    variants: int
    compiled: int
    """The others were kept from an earlier build."""
    bytes: int
    """Of all binaries, before they are packed."""
    most_registers: int
    spilling: list[str]
    """The variants that keep registers in memory."""


def catalogue() -> Iterator[Variant]:
    """The variants of all kernels: of every file below `kernels/` that has a `variants()`."""
    for path in sorted(PACKAGED.parent.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGED.parent).with_suffix("").parts)
        module = importlib.import_module(f"..{name}", __package__)
        yield from getattr(module, "variants", tuple)()


def build(
    variants: Iterable[Variant],
    targets: Sequence[Target],
    path: Path,
    *,
    workers: int = 2,
    folder: Path = KEPT,
    progressed: Progressed = lambda done, all: None,
) -> list[Summary]:
    """Writes the bundle to `path`; with 0 `workers` this process compiles.

    Raises `BundleError` that names what did not compile.
    """
    jobs: dict[tuple[str, str], Job] = {}
    for variant in variants:
        for target in targets:
            if target in variant.targets:
                job = jobs.setdefault((target.name, str(variant)), Job(variant, target, folder))
                if job.variant.kernel.source_hash != variant.kernel.source_hash:
                    raise BundleError(f"two kernels are called {variant.kernel.name}")
    missing = [job for job in jobs.values() if job.entry is None]
    folder.mkdir(parents=True, exist_ok=True)
    faults = list(_compile_all(missing, workers, progressed))
    if faults:
        raise BundleError(f"{len(faults)} of {len(missing)} failed:\n" + "\n".join(faults[:20]))
    entries: dict[str, list[Entry]] = {target.name: [] for target in targets}
    entries |= _listed(jobs)
    _write(path, entries, jobs)
    Bundle(path).check()
    compiled = [job.target.name for job in missing]
    return [_summary(name, listed, jobs, compiled.count(name)) for name, listed in entries.items()]


def _compile_all(jobs: Sequence[Job], workers: int, progressed: Progressed) -> Iterator[str]:
    """Compiles all, and yields what failed."""
    if not workers:
        for done, job in enumerate(jobs, 1):
            yield from filter(None, [_compile(job)])
            progressed(done, len(jobs))
        return
    global _jobs
    _jobs = jobs  # forked processes inherit it: Triton's functions cannot be pickled
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context) as pool:
        started = {pool.submit(_compile_number, n): job for n, job in enumerate(jobs)}
        for done, future in enumerate(as_completed(started), 1):
            try:
                yield from filter(None, [future.result()])
            except BrokenProcessPool:
                yield f"{started[future]}: its compiler, or one beside it, died"
            progressed(done, len(jobs))


_jobs: Sequence[Job] = ()


def _compile_number(number: int) -> str | None:
    return _compile(_jobs[number])


def _compile(job: Job) -> str | None:
    """Keeps what comes of a job; returns what failed."""
    knobs = triton.knobs
    with tempfile.TemporaryDirectory() as cache, knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir = cache
        # Line numbers would bring this checkout's paths into the binaries.
        knobs.compilation.disable_line_info = True
        try:
            binary, assembly = compile_variant(job.variant, job.target)
        except Exception as error:  # compilers fail in every way
            return f"{job}: {type(error).__name__}: {error}"
    job.stem.with_suffix(".bin").write_bytes(binary.image)
    ptx = assembly.encode() if job.target.has_portable_ptx else None
    if ptx is not None:
        job.stem.with_suffix(".ptx").write_bytes(ptx)
    kernel, variant = job.variant.kernel, job.variant
    taken = resources(binary, assembly, job.target)
    scratch = taken.parameters - len(variant.passed)
    if not 0 <= scratch <= 2:
        return f"{job}: has {taken.parameters} parameters, not its arguments and up to 2 more"
    entry = Entry(
        variant=str(variant),
        kernel=kernel.name,
        source=kernel.source_hash,
        arguments=list(zip(kernel.arguments, variant.types, strict=True)),
        scratch=scratch,
        constants={name: str(value) for name, value in variant.constants.items()},
        grid=kernel.grid,
        warps=variant.warps,
        stages=variant.stages,
        options={name: str(value) for name, value in variant.options.items()},
        symbol=binary.symbol,
        threads=binary.threads,
        shared=binary.shared,
        programmatic=binary.programmatic,
        cooperative=binary.cooperative,
        registers=taken.registers,
        spilled=taken.spilled,
        stack=taken.stack,
        binary=hashlib.sha256(binary.image).hexdigest(),
        ptx=hashlib.sha256(ptx).hexdigest() if ptx is not None else None,
    )
    _put(job.stem.with_suffix(".json"), json.dumps(asdict(entry)).encode())
    return None


def _listed(jobs: dict[tuple[str, str], Job]) -> dict[str, list[Entry]]:
    """Every target's entries by name; PTX stays where newer cards look for it."""
    names = {target for target, _ in jobs}
    newest = ptx_for(Target("sm_999", 0), names)
    entries: dict[str, list[Entry]] = {}
    for (target, _), job in sorted(jobs.items(), key=lambda item: item[0]):
        entry = job.entry
        assert entry is not None
        ptx = entry.ptx if target == newest else None
        entries.setdefault(target, []).append(replace(entry, ptx=ptx))
    return entries


def _write(path: Path, entries: dict[str, list[Entry]], jobs: dict[tuple[str, str], Job]) -> None:
    files: dict[str, bytes] = {}
    for target, listed in entries.items():
        files[f"{target}.json"] = json.dumps([asdict(each) for each in listed], indent=1).encode()
        for entry in listed:
            stem = jobs[target, entry.variant].stem
            files[f"binaries/{entry.binary}"] = stem.with_suffix(".bin").read_bytes()
            if entry.ptx is not None:
                files[f"binaries/{entry.ptx}"] = stem.with_suffix(".ptx").read_bytes()
    lists = {name: hashlib.sha256(files[f"{name}.json"]).hexdigest() for name in sorted(entries)}
    nvidia = triton.knobs.nvidia
    about = {
        "format": FORMAT,
        "triton": triton.__version__,
        "ptxas": {"sm_80": nvidia.ptxas.version, "sm_100": nvidia.ptxas_blackwell.version},
        "targets": lists,
    }
    files["manifest.json"] = json.dumps(about, indent=1).encode()
    packed = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with ZipFile(packed, "w", ZIP_DEFLATED) as archive:
        for name in sorted(files):
            archive.writestr(_member(name), files[name], ZIP_DEFLATED, 9)
    os.replace(packed, path)


def _member(name: str) -> ZipInfo:
    member = ZipInfo(name, _DATE)
    member.external_attr = 0o644 << 16
    return member


def _put(path: Path, content: bytes) -> None:
    """Writes a file at once, so that a broken build leaves no half of it."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(content)
    os.replace(part, path)


def _summary(
    target: str, listed: list[Entry], jobs: dict[tuple[str, str], Job], compiled: int
) -> Summary:
    images = {
        entry.binary: jobs[target, entry.variant].stem.with_suffix(".bin") for entry in listed
    }
    return Summary(
        target=target,
        variants=len(listed),
        compiled=compiled,
        bytes=sum(image.stat().st_size for image in images.values()),
        most_registers=max((entry.registers for entry in listed), default=0),
        spilling=[entry.variant for entry in listed if entry.spilled],
    )


def _chosen(names: str) -> list[Target]:
    by_name = {target.name: (target,) for target in ALL} | _GROUPS
    unknown = [name for name in names.split(",") if name not in by_name]
    if unknown:
        raise BundleError(f"no target is called {unknown[0]}; there are {', '.join(by_name)}")
    return list(dict.fromkeys(target for name in names.split(",") for target in by_name[name]))


def main(
    targets: Annotated[str, typer.Option(help="Names, by commas; or nvidia, amd, all")] = "all",
    out: Annotated[Path, typer.Option(help="The folder for bundle.zip")] = PACKAGED.parent,
    workers: Annotated[int, typer.Option(min=0, help="Processes that compile")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Say what was made as JSON")] = False,
) -> None:
    """Compile all kernels for all targets into one archive."""
    console, start, path = Console(stderr=True), time.monotonic(), out / PACKAGED.name
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        # Without a thread of its own: the compiling processes are forks of this one.
        with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
            task = bar.add_task("compiling", total=None)

            def progressed(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total, refresh=True)

            made = build(
                catalogue(), _chosen(targets), path, workers=workers, progressed=progressed
            )
    except BundleError as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        raise typer.Exit(1) from None
    seconds, size = time.monotonic() - start, path.stat().st_size
    if as_json:
        about = {"path": str(path), "bytes": size, "seconds": round(seconds, 1)}
        typer.echo(json.dumps(about | {"targets": [asdict(each) for each in made]}, indent=1))
        return
    table = Table("target", "variants", "compiled now", "KB", "most registers", "spilling")
    for each in made:
        numbers = (each.variants, each.compiled, each.bytes // 1000, each.most_registers)
        table.add_row(each.target, *map(str, numbers), str(len(each.spilling)))
    Console().print(table)
    typer.echo(f"{path}: {size / 1e6:.1f} MB in {seconds:.0f} s")


if __name__ == "__main__":
    typer.run(main)
