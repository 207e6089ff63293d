"""Settings of one worker: what it loads, how much it may hold, where it listens.

Frozen pydantic models; unknown keys are refused; every default stands here and nowhere else.
"""

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from .errors import ConfigError
from .knobs import MOST_ERROR, MOST_GIB, Knobs

FLEET_SECRET = "CONCLAVE_FLEET_SECRET"
"""Environment variable with the secret of a fleet; without it every fleet makes one of its own."""
FLEET_SECRET_KEY = "conclave-fleet"
"""Metadata key under which a worker's callers show the fleet's secret."""
FLEET_SECRET_LENGTH = 16
"""The shortest that is taken."""

LEAST_PROMPT_ERROR = 0.005
"""Below, two digits of 8 bits could not hold every row."""
LEAST_PROMPT_STEP = 1024
"""Tokens of a step that are multiplied as integers."""

Count = Annotated[int, Field(gt=0, lt=2**31)]
"""More is a mistake, and what follows from it may not even be a number."""
DTypeName = Literal["auto", "float32", "bfloat16", "float16"]


class EngineConfig(BaseModel):
    """What the engine loads and how it batches."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Path
    """Hugging Face checkpoint folder (config.json, safetensors, tokenizer.json), or a compressed
    one of ours (with conclave.json)."""
    device: str = "auto"
    """`auto` is the GPU if there is one, else the CPU; or a torch device such as `cuda:0`."""
    dtype: DTypeName = "auto"
    """`auto` is float32 on the CPU and bfloat16 on a GPU."""
    weight_format: str | None = None
    """Format of the layers' large weights, such as `dense-int8-g64` or `5:16-int4-g64`, into which
    loading packs them by magnitude alone; None leaves them to the knobs."""
    knobs: Knobs = Knobs()
    """How much of the model is kept, and what it may take; see docs/knobs.md."""
    prompt_error: float | None = Field(default=None, ge=LEAST_PROMPT_ERROR, le=MOST_ERROR)
    """||x - seen|| / ||x|| at most, of what linears are given for each token: in steps of 1,024
    tokens and more they may then multiply as integers of 8 bits, which a Hopper card does faster.
    It is for weights of 4 bits with whole scales (`conclave compress --whole-scales`; weights that
    loading packs get them). None multiplies in the model's dtype. Needs `max_step_tokens` of 1,024
    at least."""
    max_context: Count | None = None
    """Longest prompt plus answer in tokens; None takes the model's own limit, at most 8192."""
    max_sequences: Count = 64
    """Sequences that may run in one step."""
    max_step_tokens: Count = 512
    """Tokens computed in one step; longer prompts are prefilled in chunks of at most this."""
    block_size: Count = 16
    """Tokens in one block of the KV cache."""
    kv_tokens: Count | None = None
    """Tokens the KV cache holds in full-attention layers; None fits it to the memory."""
    kv_memory_gib: float | None = Field(default=None, gt=0, le=MOST_GIB)
    """Memory for the KV cache in GiB; None takes a share of what is free after loading."""
    kv_host_gib: float | None = Field(default=None, gt=0, le=MOST_GIB)
    """Host memory, locked, for keys and values that have lost their place on the device: of
    sequences that were preempted or sit idle, and of prompts read before. They come back from
    there instead of being computed again."""
    stream_experts: bool = True
    """Where experts do not fit `knobs.memory_budget`: keep all on the host and fetch single ones
    into slots as they are needed, instead of copying whole layers at every step."""
    stream_coded: bool = True
    """Where layers do not fit `knobs.memory_budget`: keep them in a shorter code without loss, on
    the device too, and decode each before it runs, if that makes steps faster."""
    cuda_graphs: bool = True
    """Record decode steps as CUDA graphs, one for each size, and replay them: a GPU then does not
    wait for the host between kernels. Steps of plain experts and of float32 are not recorded."""
    prefix_cache: bool = True
    """Reuse the KV blocks of a prompt's beginning that an earlier request has computed."""
    max_logprobs: int = Field(default=64, ge=0)
    """Most candidates a request may ask for at each token."""
    max_outputs: Count = 16
    """Most answers (`n`) a request may ask for."""
    max_waiting: Count = 1024
    """Sequences that may wait; a further request is refused with RESOURCE_EXHAUSTED."""
    threads: Count | None = None
    """CPU threads for torch; None takes what torch would, but leaves one core to the rest."""

    @property
    def cache_knob(self) -> str | None:
        """The setting that sizes the KV cache; None leaves that to the memory."""
        return next(iter(self._cache_knobs()), None)

    def _cache_knobs(self) -> list[str]:
        given = {
            "kv_tokens": self.kv_tokens,
            "kv_memory_gib": self.kv_memory_gib,
            "knobs.memory_budget": self.knobs.memory_budget,
        }
        return [name for name, value in given.items() if value is not None]

    @model_validator(mode="after")
    def _one_cache_size(self) -> "EngineConfig":
        names = self._cache_knobs()
        if len(names) > 1:
            raise ValueError(f"{' and '.join(names)} both size the KV cache; give one, not both")
        return self

    @model_validator(mode="after")
    def _host_blocks_are_found(self) -> "EngineConfig":
        if self.kv_host_gib is None:
            return self
        if not self.prefix_cache:
            raise ValueError("kv_host_gib keeps what prefix_cache finds: turn that on, or leave it")
        if self.knobs.max_error is not None:
            raise ValueError(
                "kv_host_gib keeps keys and values in the model's dtype only, not yet those that "
                "knobs.max_error stores in narrow numbers: give one of the two"
            )
        return self

    @model_validator(mode="after")
    def _steps_are_long_enough(self) -> "EngineConfig":
        if self.prompt_error is not None and self.max_step_tokens < LEAST_PROMPT_STEP:
            raise ValueError(
                f"prompt_error is for steps of {LEAST_PROMPT_STEP} tokens and more, and "
                f"max_step_tokens is {self.max_step_tokens}: raise that, or leave prompt_error out"
            )
        return self

    @model_validator(mode="after")
    def _prefetch_has_a_budget(self) -> "EngineConfig":
        if self.knobs.prefetch is not None and self.knobs.memory_budget is None:
            raise ValueError(
                "knobs.prefetch is about weights that do not fit knobs.memory_budget: "
                "give that too, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _one_weight_format(self) -> "EngineConfig":
        kept = self.knobs.sparsity is not None or self.knobs.weight_bits is not None
        if self.weight_format is not None and kept:
            raise ValueError("give weight_format or the knobs sparsity and weight_bits, not both")
        return self


class WorkerConfig(BaseModel):
    """One worker: an engine, a name, and a gRPC address."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str = Field(default="worker", min_length=1)
    """Unique in the fleet; also the name of its Ray actor."""
    engine: EngineConfig
    host: str = Field(default="auto", min_length=1)
    """Address to listen on; `auto` is the node's own in a Ray cluster, else the loopback."""
    port: int = Field(default=0, ge=0, le=65535)
    """0 takes a free port."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Free words for selecting workers."""
    max_message_mib: int = Field(default=64, gt=0)
    """Largest gRPC message in either direction."""
    fleet_secret: SecretStr | None = None
    """What callers must show; None answers everybody who reaches the port."""
    insecure: bool = False
    """Listens beyond the loopback even without a secret."""

    @property
    def listen_host(self) -> str:
        """The address to bind when nobody has named one."""
        return "127.0.0.1" if self.host == "auto" else self.host


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`.

    A name counts as open to others, because what it resolves to may change.
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def fleet_secret_given() -> SecretStr | None:
    """The secret that the environment names. Raises ConfigError if it cannot serve as one."""
    text = os.environ.get(FLEET_SECRET, "").strip()
    if not text:
        return None
    # It travels as gRPC metadata, which knows printable ASCII only.
    if len(text) < FLEET_SECRET_LENGTH or not text.isascii() or not text.isprintable():
        raise ConfigError(
            f"{FLEET_SECRET} must be at least {FLEET_SECRET_LENGTH} printable ASCII characters"
        )
    return SecretStr(text)
