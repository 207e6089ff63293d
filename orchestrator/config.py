"""The fleet file: which workers there shall be, and how the gateway treats its callers.

Frozen pydantic models; unknown keys are refused; every default stands here and nowhere else. An
engine's knobs are those of `conclave.worker.config.EngineConfig`, not a copy of them. Gave up:
includes, variables and overlays; a fleet is one file that can be read from top to bottom.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from ..worker.config import EngineConfig, WorkerConfig
from ..worker.errors import ConfigError

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class FleetConfigError(ConfigError):
    """A fleet file that cannot be read or breaks a rule; names each place in it."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GatewayConfig(_Section):
    """The one door of the fleet."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 opens it to other machines, without encryption."""
    port: int = Field(default=50051, ge=0, le=65535)
    """0 takes a free port."""
    max_message_mib: int = Field(default=64, gt=0)
    """Largest gRPC message in either direction, at the gateway and at its workers."""
    attempts: int = Field(default=3, gt=0)
    """Workers an unanswered ask may be tried on."""
    wait_for_worker_seconds: float = Field(default=10.0, ge=0)
    """How long an ask waits if no worker serves, but one is starting."""
    grace_seconds: float = Field(default=30.0, ge=0)
    """How long running asks may go on when the fleet stops."""
    reflection: bool = True
    """Lets tools such as grpcurl list the services."""
    one_core: bool = True
    """Keeps the gateway's threads on one core, which lowers latency; it can use little more."""


class Resources(_Section):
    """What Ray sets aside for one worker."""

    num_cpus: float = Field(default=1.0, ge=0)
    num_gpus: float | Literal["auto"] = "auto"
    """`auto` is 1 if the cluster has a GPU now, else 0; say 1 where GPU nodes start on demand."""
    custom: dict[str, float] = Field(default_factory=dict)
    """Ray's custom resources, by name."""
    max_restarts: int = Field(default=-1, ge=-1)
    """How often Ray starts a dead worker again; -1 is always."""


class WorkerGroup(_Section):
    """Workers that differ only in their names."""

    name: str = Field(pattern=NAME_PATTERN)
    """The worker's name; with more than one replica NAME-0, NAME-1 and so on."""
    replicas: int = Field(default=1, ge=0)
    engine: EngineConfig
    """A relative `model` is looked for beside the fleet file."""
    resources: Resources = Resources()
    labels: dict[str, str] = Field(default_factory=dict)
    """Free words for selecting workers."""
    detached: bool = False
    """Keeps the workers alive when the process that serves the fleet ends; the next one that serves
    it takes them over as they are, with the settings they were started with."""

    @field_validator("engine")
    @classmethod
    def _beside_the_file(cls, engine: EngineConfig, info: ValidationInfo) -> EngineConfig:
        folder = (info.context or {}).get("folder")
        if folder is None:
            return engine
        return engine.model_copy(update={"model": folder / engine.model})

    def names(self) -> tuple[str, ...]:
        """The names of this group's workers."""
        if self.replicas == 1:
            return (self.name,)
        return tuple(f"{self.name}-{index}" for index in range(self.replicas))


@dataclass(frozen=True)
class WorkerSpec:
    """One worker the fleet shall have: what it runs and what it is given."""

    config: WorkerConfig
    resources: Resources
    detached: bool

    @property
    def name(self) -> str:
        """Unique in the fleet."""
        return self.config.name


class FleetConfig(_Section):
    """A whole fleet."""

    name: str = Field(default="fleet", pattern=NAME_PATTERN)
    """Unique in the Ray cluster; part of every worker's actor name."""
    gateway: GatewayConfig = GatewayConfig()
    workers: tuple[WorkerGroup, ...]

    @model_validator(mode="after")
    def _names_differ(self) -> "FleetConfig":
        names = [name for group in self.workers for name in group.names()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"worker names must differ; given twice: {', '.join(twice)}")
        if not names:
            raise ValueError("a fleet needs at least one worker; raise a group's `replicas`")
        return self

    @classmethod
    def load(cls, path: Path) -> "FleetConfig":
        """Reads a fleet file. Raises FleetConfigError, which names every broken place."""
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise FleetConfigError(f"{path}: cannot be read: {error}") from error
        except yaml.YAMLError as error:
            raise FleetConfigError(f"{path}: is not YAML: {error}") from error
        return cls.parse(data, source=str(path), folder=path.resolve().parent)

    @classmethod
    def parse(cls, data: object, *, source: str, folder: Path | None = None) -> "FleetConfig":
        """Makes a fleet of plain data; `folder` is where relative model paths start."""
        if not isinstance(data, dict):
            raise FleetConfigError(f"{source}: must be a mapping with the key `workers`")
        try:
            return cls.model_validate(data, context={"folder": folder})
        except ValidationError as error:
            lines = [_explain(detail) for detail in error.errors()]
            raise FleetConfigError("\n".join(f"{source}: {line}" for line in lines)) from error

    def specs(self) -> tuple[WorkerSpec, ...]:
        """Every worker the fleet shall have, in the order of the file."""
        return tuple(
            WorkerSpec(
                config=WorkerConfig(
                    name=name,
                    engine=group.engine,
                    labels=group.labels,
                    max_message_mib=self.gateway.max_message_mib,
                ),
                resources=group.resources,
                detached=group.detached,
            )
            for group in self.workers
            for name in group.names()
        )


def _explain(detail: ErrorDetails) -> str:
    place = _place(detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{place}: unknown key{_suggestion(detail['loc'])}"
    if detail["type"] == "missing":
        return f"{place}: is missing"
    message = detail["msg"].removeprefix("Value error, ")
    given = detail["input"]
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{place}: {message}{shown}" if place else message


def _place(location: Sequence[int | str]) -> str:
    """`("workers", 0, "name")` as `workers[0].name`."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


def _suggestion(location: Sequence[int | str]) -> str:
    known = list(_known_keys(location[:-1]))
    close = get_close_matches(str(location[-1]), known, n=1)
    if close:
        return f"; did you mean `{close[0]}`?"
    return f"; known here: {', '.join(known)}" if known else ""


def _known_keys(location: Iterable[int | str]) -> Iterable[str]:
    model: Any = FleetConfig
    for part in location:
        if isinstance(part, str):
            model = model.model_fields[part].annotation
        else:
            model = get_args(model)[0]
    return model.model_fields if isinstance(model, type) and issubclass(model, BaseModel) else ()
