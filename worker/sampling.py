"""What a caller may ask of token choice: one frozen, checked model, shared by notebook and gRPC.

Rules that depend on the loaded model (vocabulary size, context length) are checked by the engine.
"""

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import InvalidRequest, Violation

MAX_STOPS = 16
MAX_STOP_LENGTH = 256


class SamplingParams(BaseModel):
    """How to choose tokens; the meaning of each field stands in `protos/generation.proto`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    temperature: float = Field(default=1.0, ge=0, le=100)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)
    logit_bias: dict[int, float] = Field(default_factory=dict)
    seed: int | None = Field(default=None, ge=0, lt=2**64)
    n: int = Field(default=1, ge=1)
    max_tokens: int | None = Field(default=None, ge=0)
    min_tokens: int = Field(default=0, ge=0)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = Field(default=None, ge=0)
    prompt_logprobs: int | None = Field(default=None, ge=0)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken without a draw."""
        return self.temperature == 0

    @property
    def penalised(self) -> bool:
        """Whether tokens already seen change the logits."""
        return (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
        )

    @model_validator(mode="after")
    def _rules_between_fields(self) -> "SamplingParams":
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is over max_tokens {self.max_tokens}")
        if len(self.stop) > MAX_STOPS:
            raise ValueError(f"stop has {len(self.stop)} texts; at most {MAX_STOPS} are allowed")
        if any(not 0 < len(text) <= MAX_STOP_LENGTH for text in self.stop):
            raise ValueError(f"stop texts must have 1 to {MAX_STOP_LENGTH} characters")
        if any(not -100 <= bias <= 100 for bias in self.logit_bias.values()):
            raise ValueError("logit_bias values must lie between -100 and 100")
        return self

    @classmethod
    def checked(cls, fields: dict[str, object]) -> "SamplingParams":
        """Build from plain fields; raises InvalidRequest that names every field at fault."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise InvalidRequest([_violation(dict(e)) for e in error.errors()]) from None


def _violation(error: dict[str, object]) -> Violation:
    location = error["loc"]
    assert isinstance(location, tuple)
    message = str(error["msg"]).removeprefix("Value error, ")
    path = [str(part) for part in location]
    if not path:  # a rule between fields; its message starts with the field's name
        path = [message.split()[0]]
    return Violation(
        ".".join(["sampling", *path]),
        f"{message} (got {error['input']!r})" if location else message,
    )
