from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class MemberState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MEMBER_STATE_UNSPECIFIED: _ClassVar[MemberState]
    MEMBER_STATE_ASKED: _ClassVar[MemberState]
    MEMBER_STATE_ANSWERED: _ClassVar[MemberState]
    MEMBER_STATE_LEFT_BEHIND: _ClassVar[MemberState]
    MEMBER_STATE_FAILED: _ClassVar[MemberState]
    MEMBER_STATE_CANCELLED: _ClassVar[MemberState]
MEMBER_STATE_UNSPECIFIED: MemberState
MEMBER_STATE_ASKED: MemberState
MEMBER_STATE_ANSWERED: MemberState
MEMBER_STATE_LEFT_BEHIND: MemberState
MEMBER_STATE_FAILED: MemberState
MEMBER_STATE_CANCELLED: MemberState

class WorkerSelector(_message.Message):
    __slots__ = ("names", "model", "labels")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAMES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    model: str
    labels: _containers.ScalarMap[str, str]
    def __init__(self, names: _Optional[_Iterable[str]] = ..., model: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ...) -> None: ...

class EnsembleSpec(_message.Message):
    __slots__ = ("single", "hedge", "vote", "best_of", "cascade", "mixture", "fuse", "mixture_sample", "members", "count", "quorum", "member_timeout_seconds", "max_total_tokens", "max_cost", "seed", "width", "include_texts")
    SINGLE_FIELD_NUMBER: _ClassVar[int]
    HEDGE_FIELD_NUMBER: _ClassVar[int]
    VOTE_FIELD_NUMBER: _ClassVar[int]
    BEST_OF_FIELD_NUMBER: _ClassVar[int]
    CASCADE_FIELD_NUMBER: _ClassVar[int]
    MIXTURE_FIELD_NUMBER: _ClassVar[int]
    FUSE_FIELD_NUMBER: _ClassVar[int]
    MIXTURE_SAMPLE_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    QUORUM_FIELD_NUMBER: _ClassVar[int]
    MEMBER_TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_COST_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_TEXTS_FIELD_NUMBER: _ClassVar[int]
    single: Single
    hedge: Hedge
    vote: Vote
    best_of: BestOf
    cascade: Cascade
    mixture: Mixture
    fuse: Fuse
    mixture_sample: MixtureSample
    members: _containers.RepeatedCompositeFieldContainer[Member]
    count: int
    quorum: int
    member_timeout_seconds: float
    max_total_tokens: int
    max_cost: float
    seed: int
    width: _containers.RepeatedCompositeFieldContainer[WidthStep]
    include_texts: bool
    def __init__(self, single: _Optional[_Union[Single, _Mapping]] = ..., hedge: _Optional[_Union[Hedge, _Mapping]] = ..., vote: _Optional[_Union[Vote, _Mapping]] = ..., best_of: _Optional[_Union[BestOf, _Mapping]] = ..., cascade: _Optional[_Union[Cascade, _Mapping]] = ..., mixture: _Optional[_Union[Mixture, _Mapping]] = ..., fuse: _Optional[_Union[Fuse, _Mapping]] = ..., mixture_sample: _Optional[_Union[MixtureSample, _Mapping]] = ..., members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ..., count: _Optional[int] = ..., quorum: _Optional[int] = ..., member_timeout_seconds: _Optional[float] = ..., max_total_tokens: _Optional[int] = ..., max_cost: _Optional[float] = ..., seed: _Optional[int] = ..., width: _Optional[_Iterable[_Union[WidthStep, _Mapping]]] = ..., include_texts: _Optional[bool] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("selector", "weight")
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    selector: WorkerSelector
    weight: float
    def __init__(self, selector: _Optional[_Union[WorkerSelector, _Mapping]] = ..., weight: _Optional[float] = ...) -> None: ...

class WidthStep(_message.Message):
    __slots__ = ("load", "members")
    LOAD_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    load: float
    members: int
    def __init__(self, load: _Optional[float] = ..., members: _Optional[int] = ...) -> None: ...

class Single(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Hedge(_message.Message):
    __slots__ = ("quantile", "after_seconds")
    QUANTILE_FIELD_NUMBER: _ClassVar[int]
    AFTER_SECONDS_FIELD_NUMBER: _ClassVar[int]
    quantile: float
    after_seconds: float
    def __init__(self, quantile: _Optional[float] = ..., after_seconds: _Optional[float] = ...) -> None: ...

class Vote(_message.Message):
    __slots__ = ("samples", "extract", "normalize")
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    EXTRACT_FIELD_NUMBER: _ClassVar[int]
    NORMALIZE_FIELD_NUMBER: _ClassVar[int]
    samples: int
    extract: str
    normalize: bool
    def __init__(self, samples: _Optional[int] = ..., extract: _Optional[str] = ..., normalize: _Optional[bool] = ...) -> None: ...

class BestOf(_message.Message):
    __slots__ = ("samples", "ranking")
    class Ranking(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        RANKING_UNSPECIFIED: _ClassVar[BestOf.Ranking]
        RANKING_CROSS: _ClassVar[BestOf.Ranking]
        RANKING_OWN: _ClassVar[BestOf.Ranking]
    RANKING_UNSPECIFIED: BestOf.Ranking
    RANKING_CROSS: BestOf.Ranking
    RANKING_OWN: BestOf.Ranking
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    RANKING_FIELD_NUMBER: _ClassVar[int]
    samples: int
    ranking: BestOf.Ranking
    def __init__(self, samples: _Optional[int] = ..., ranking: _Optional[_Union[BestOf.Ranking, str]] = ...) -> None: ...

class Cascade(_message.Message):
    __slots__ = ("min_mean_logprob",)
    MIN_MEAN_LOGPROB_FIELD_NUMBER: _ClassVar[int]
    min_mean_logprob: float
    def __init__(self, min_mean_logprob: _Optional[float] = ...) -> None: ...

class Mixture(_message.Message):
    __slots__ = ("aggregator", "template")
    AGGREGATOR_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    aggregator: int
    template: str
    def __init__(self, aggregator: _Optional[int] = ..., template: _Optional[str] = ...) -> None: ...

class Fuse(_message.Message):
    __slots__ = ("combine", "candidates")
    class Combine(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        COMBINE_UNSPECIFIED: _ClassVar[Fuse.Combine]
        COMBINE_MEAN: _ClassVar[Fuse.Combine]
        COMBINE_PRODUCT: _ClassVar[Fuse.Combine]
    COMBINE_UNSPECIFIED: Fuse.Combine
    COMBINE_MEAN: Fuse.Combine
    COMBINE_PRODUCT: Fuse.Combine
    COMBINE_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    combine: Fuse.Combine
    candidates: int
    def __init__(self, combine: _Optional[_Union[Fuse.Combine, str]] = ..., candidates: _Optional[int] = ...) -> None: ...

class MixtureSample(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MemberReport(_message.Message):
    __slots__ = ("worker", "model", "state", "member", "role", "prompt_tokens", "completion_tokens", "first_token", "total", "mean_logprob", "score", "answer", "agreed", "cost", "reason", "text", "dissents", "rejoined")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    MEAN_LOGPROB_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    AGREED_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    DISSENTS_FIELD_NUMBER: _ClassVar[int]
    REJOINED_FIELD_NUMBER: _ClassVar[int]
    worker: str
    model: str
    state: MemberState
    member: int
    role: str
    prompt_tokens: int
    completion_tokens: int
    first_token: float
    total: float
    mean_logprob: float
    score: float
    answer: str
    agreed: bool
    cost: float
    reason: str
    text: str
    dissents: int
    rejoined: int
    def __init__(self, worker: _Optional[str] = ..., model: _Optional[str] = ..., state: _Optional[_Union[MemberState, str]] = ..., member: _Optional[int] = ..., role: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., first_token: _Optional[float] = ..., total: _Optional[float] = ..., mean_logprob: _Optional[float] = ..., score: _Optional[float] = ..., answer: _Optional[str] = ..., agreed: _Optional[bool] = ..., cost: _Optional[float] = ..., reason: _Optional[str] = ..., text: _Optional[str] = ..., dissents: _Optional[int] = ..., rejoined: _Optional[int] = ...) -> None: ...

class EnsembleReport(_message.Message):
    __slots__ = ("strategy", "members", "asked_width", "width", "total_tokens", "cost", "agreement")
    STRATEGY_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    ASKED_WIDTH_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    AGREEMENT_FIELD_NUMBER: _ClassVar[int]
    strategy: str
    members: _containers.RepeatedCompositeFieldContainer[MemberReport]
    asked_width: int
    width: int
    total_tokens: int
    cost: float
    agreement: float
    def __init__(self, strategy: _Optional[str] = ..., members: _Optional[_Iterable[_Union[MemberReport, _Mapping]]] = ..., asked_width: _Optional[int] = ..., width: _Optional[int] = ..., total_tokens: _Optional[int] = ..., cost: _Optional[float] = ..., agreement: _Optional[float] = ...) -> None: ...

class TokenVote(_message.Message):
    __slots__ = ("member", "logprob", "agreed")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    AGREED_FIELD_NUMBER: _ClassVar[int]
    member: int
    logprob: float
    agreed: bool
    def __init__(self, member: _Optional[int] = ..., logprob: _Optional[float] = ..., agreed: _Optional[bool] = ...) -> None: ...
