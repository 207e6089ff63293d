"""The fleet file: which workers there shall be, and how the gateway treats its callers.

Frozen pydantic models; unknown keys are refused; every default stands here and nowhere else. An
engine's knobs are those of `conclave.worker.config.EngineConfig`, not a copy of them. Gave up:
includes, variables and overlays; a fleet is one file that can be read from top to bottom.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from google.protobuf import json_format
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

from ..protos.ensemble_pb2 import EnsembleSpec
from ..worker.config import EngineConfig, WorkerConfig
from ..worker.errors import ConfigError
from .security.settings import SecurityConfig

Surge = Literal["auto", "always", "never"]
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class FleetConfigError(ConfigError):
    """A fleet file that cannot be read or breaks a rule; names each place in it."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GatewayConfig(_Section):
    """The one door of the fleet."""

    host: str = "127.0.0.1"
    """Address to listen on; beyond the loopback only with `security`."""
    port: int = Field(default=50051, ge=0, le=65535)
    """0 takes a free port."""
    max_message_mib: int = Field(default=64, gt=0)
    """Largest gRPC message in either direction, at the gateway and at its workers."""
    attempts: int = Field(default=3, gt=0)
    """Workers an unanswered ask may be tried on."""
    wait_for_worker_seconds: float = Field(default=10.0, ge=0)
    """How long an ask waits if no worker serves, but one is starting."""
    max_queued_requests: int = Field(default=1024, ge=0)
    """Asks that may wait for room at a worker; further ones get RESOURCE_EXHAUSTED."""
    max_queued_tokens: int = Field(default=4_000_000, ge=0)
    """The same in tokens, prompts and longest answers together."""
    retry_share: float = Field(default=0.1, ge=0, le=1)
    """Retries and resumed streams for each ask, on average."""
    retry_reserve: float = Field(default=256.0, ge=0)
    """Retries and resumes that may come at once, when a worker dies."""
    hedge_share: float = Field(default=0.1, ge=0, le=1)
    """Hedges for each ask, on average."""
    prefix_affinity: bool = True
    """Prefers the worker that has computed a prompt's beginning, while the load gap is small."""
    hang_seconds: float = Field(default=5.0, gt=0)
    """A worker without a heartbeat for that long is taken to hang; its streams move."""
    stuck_seconds: float = Field(default=30.0, gt=0)
    """The same for an engine whose step does not end."""
    grace_seconds: float = Field(default=30.0, ge=0)
    """How long running asks may go on when the fleet stops."""
    reflection: bool = True
    """Lets tools such as grpcurl list the services."""
    security: SecurityConfig = SecurityConfig()
    ensembles: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Presets: ensembles that an ask can name. The fields of EnsembleSpec (protos/ensemble.proto),
    such as `{vote: {}, count: 3}`."""
    one_core: bool = True
    """Keeps the gateway's threads on one core, which lowers latency; it can use little more."""

    @field_validator("ensembles")
    @classmethod
    def _are_specs(cls, ensembles: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, fields in ensembles.items():
            try:
                spec = json_format.ParseDict(fields, EnsembleSpec())
            except json_format.ParseError as error:
                raise ValueError(f"`{name}` is not an ensemble: {error}") from None
            if spec.WhichOneof("strategy") is None:
                raise ValueError(f"`{name}` has no strategy; set one, such as `vote: {{}}`")
        return ensembles

    def presets(self) -> dict[str, EnsembleSpec]:
        """The ensembles as messages."""
        return {
            name: json_format.ParseDict(fields, EnsembleSpec())
            for name, fields in self.ensembles.items()
        }


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
    """The worker's name; where there may be several NAME-0, NAME-1 and so on."""
    replicas: int | None = Field(default=None, ge=0)
    """A fixed number of workers, 1 if `max` is not given either."""
    min: int | None = Field(default=None, ge=0)
    """Fewest workers of a group that scales, 1 if only `max` is given. With 0 the first ask waits
    for a worker to start: raise `gateway.wait_for_worker_seconds`."""
    max: int | None = Field(default=None, ge=1)
    """Most workers of a group that scales; instead of `replicas`."""
    target_load: float = Field(default=0.7, gt=0)
    """There are as many workers as keep open answers at this share of `engine.max_sequences`."""
    scale_down_after_seconds: float = Field(default=300.0, ge=0)
    """How long fewer workers must have been enough before one goes."""
    drain_seconds: float | None = Field(default=None, ge=0)
    """How long a worker's running answers may go on when it is scaled down or replaced; null lets
    all of them end."""
    surge: Surge = "auto"
    """Whether a worker's replacement starts before the worker goes. `auto`: if a node has room for
    it now. `always`: waits for room, as where nodes start on demand. `never`: it goes first."""
    revision: str = ""
    """A free word; changing it replaces the workers, as any other change of their settings does."""
    engine: EngineConfig
    """A relative `model` is looked for beside the fleet file."""
    resources: Resources = Resources()
    labels: dict[str, str] = Field(default_factory=dict)
    """Free words for selecting workers."""
    detached: bool = False
    """Keeps the workers alive when the process that serves the fleet ends; the next one that serves
    it takes them over."""

    @field_validator("engine")
    @classmethod
    def _beside_the_file(cls, engine: EngineConfig, info: ValidationInfo) -> EngineConfig:
        folder = (info.context or {}).get("folder")
        if folder is None:
            return engine
        return engine.model_copy(update={"model": folder / engine.model})

    @model_validator(mode="after")
    def _one_size(self) -> "WorkerGroup":
        if self.replicas is not None and (self.min is not None or self.max is not None):
            raise ValueError("give `replicas`, or `min` and `max`, not both")
        if self.min is not None and self.max is None:
            raise ValueError("`min` needs a `max`; for a fixed number give `replicas`")
        if self.smallest > self.largest:
            raise ValueError(f"`min` is {self.smallest}, more than `max`, which is {self.largest}")
        return self

    @property
    def smallest(self) -> int:
        """Fewest workers."""
        if self.max is None:
            return self.largest
        return 1 if self.min is None else self.min

    @property
    def largest(self) -> int:
        """Most workers."""
        if self.max is not None:
            return self.max
        return 1 if self.replicas is None else self.replicas

    def names(self) -> tuple[str, ...]:
        """The names of this group's workers, as many as there may be."""
        if self.largest == 1:
            return (self.name,)
        return tuple(f"{self.name}-{index}" for index in range(self.largest))


@dataclass(frozen=True)
class WorkerSpec:
    """One worker the fleet may have: what it runs and what it is given."""

    config: WorkerConfig
    resources: Resources
    detached: bool
    group: str = ""
    revision: str = ""

    @property
    def name(self) -> str:
        """Unique in the fleet."""
        return self.config.name

    @cached_property
    def version(self) -> str:
        """Of its settings: workers of another version are replaced."""
        settings = {
            "engine": self.config.engine.model_dump(mode="json"),
            "labels": self.config.labels,
            "max_message_mib": self.config.max_message_mib,
            "resources": self.resources.model_dump(mode="json"),
            "detached": self.detached,
            "revision": self.revision,
        }
        text = json.dumps(settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


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

    def first_names(self) -> tuple[str, ...]:
        """The workers that are declared before any has been seen: of every group at least one."""
        return tuple(
            name for group in self.workers for name in group.names()[: max(1, group.smallest)]
        )

    def specs(self) -> tuple[WorkerSpec, ...]:
        """Every worker the fleet may have, in the order of the file."""
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
                group=group.name,
                revision=group.revision,
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
    # Who puts a token where its hash belongs shall not find it in a log.
    tells = isinstance(given, str | int | float | bool) and "security" not in detail["loc"]
    shown = f" (given: {given!r})" if tells else ""
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
