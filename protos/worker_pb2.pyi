from conclave.protos import generation_pb2 as _generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StepRequest(_message.Message):
    __slots__ = ("open", "take")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    TAKE_FIELD_NUMBER: _ClassVar[int]
    open: StepOpen
    take: StepTake
    def __init__(self, open: _Optional[_Union[StepOpen, _Mapping]] = ..., take: _Optional[_Union[StepTake, _Mapping]] = ...) -> None: ...

class StepOpen(_message.Message):
    __slots__ = ("request", "candidates", "generate")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    GENERATE_FIELD_NUMBER: _ClassVar[int]
    request: _generation_pb2.GenerateRequest
    candidates: int
    generate: int
    def __init__(self, request: _Optional[_Union[_generation_pb2.GenerateRequest, _Mapping]] = ..., candidates: _Optional[int] = ..., generate: _Optional[int] = ...) -> None: ...

class StepTake(_message.Message):
    __slots__ = ("ids", "generate")
    IDS_FIELD_NUMBER: _ClassVar[int]
    GENERATE_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    generate: int
    def __init__(self, ids: _Optional[_Iterable[int]] = ..., generate: _Optional[int] = ...) -> None: ...

class StepResponse(_message.Message):
    __slots__ = ("position", "tokens", "end", "ids", "logprobs", "opened")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    position: int
    tokens: _containers.RepeatedCompositeFieldContainer[_generation_pb2.Token]
    end: _generation_pb2.OutputEnd
    ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    opened: StepOpened
    def __init__(self, position: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[_generation_pb2.Token, _Mapping]]] = ..., end: _Optional[_Union[_generation_pb2.OutputEnd, _Mapping]] = ..., ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., opened: _Optional[_Union[StepOpened, _Mapping]] = ...) -> None: ...

class StepOpened(_message.Message):
    __slots__ = ("prompt_ids", "cached_tokens", "vocab_size", "sampling", "suppressed_ids", "stop_ids", "worker", "model", "tokenizer_fingerprint")
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SUPPRESSED_IDS_FIELD_NUMBER: _ClassVar[int]
    STOP_IDS_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    prompt_ids: _containers.RepeatedScalarFieldContainer[int]
    cached_tokens: int
    vocab_size: int
    sampling: _generation_pb2.SamplingParams
    suppressed_ids: _containers.RepeatedScalarFieldContainer[int]
    stop_ids: _containers.RepeatedScalarFieldContainer[int]
    worker: str
    model: str
    tokenizer_fingerprint: str
    def __init__(self, prompt_ids: _Optional[_Iterable[int]] = ..., cached_tokens: _Optional[int] = ..., vocab_size: _Optional[int] = ..., sampling: _Optional[_Union[_generation_pb2.SamplingParams, _Mapping]] = ..., suppressed_ids: _Optional[_Iterable[int]] = ..., stop_ids: _Optional[_Iterable[int]] = ..., worker: _Optional[str] = ..., model: _Optional[str] = ..., tokenizer_fingerprint: _Optional[str] = ...) -> None: ...

class WatchLoadRequest(_message.Message):
    __slots__ = ("interval_seconds",)
    INTERVAL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    interval_seconds: float
    def __init__(self, interval_seconds: _Optional[float] = ...) -> None: ...

class ConverseRequest(_message.Message):
    __slots__ = ("ask", "generate", "complete", "score", "cancel", "timeout_seconds")
    ASK_FIELD_NUMBER: _ClassVar[int]
    GENERATE_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ask: int
    generate: _generation_pb2.GenerateRequest
    complete: _generation_pb2.GenerateRequest
    score: _generation_pb2.ScoreRequest
    cancel: CancelAsk
    timeout_seconds: float
    def __init__(self, ask: _Optional[int] = ..., generate: _Optional[_Union[_generation_pb2.GenerateRequest, _Mapping]] = ..., complete: _Optional[_Union[_generation_pb2.GenerateRequest, _Mapping]] = ..., score: _Optional[_Union[_generation_pb2.ScoreRequest, _Mapping]] = ..., cancel: _Optional[_Union[CancelAsk, _Mapping]] = ..., timeout_seconds: _Optional[float] = ...) -> None: ...

class CancelAsk(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ConverseResponse(_message.Message):
    __slots__ = ("replies",)
    REPLIES_FIELD_NUMBER: _ClassVar[int]
    replies: _containers.RepeatedCompositeFieldContainer[Reply]
    def __init__(self, replies: _Optional[_Iterable[_Union[Reply, _Mapping]]] = ...) -> None: ...

class Reply(_message.Message):
    __slots__ = ("ask", "event", "completion", "scores", "status", "last")
    ASK_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    ask: int
    event: _generation_pb2.GenerateResponse
    completion: _generation_pb2.CompleteResponse
    scores: _generation_pb2.ScoreResponse
    status: bytes
    last: bool
    def __init__(self, ask: _Optional[int] = ..., event: _Optional[_Union[_generation_pb2.GenerateResponse, _Mapping]] = ..., completion: _Optional[_Union[_generation_pb2.CompleteResponse, _Mapping]] = ..., scores: _Optional[_Union[_generation_pb2.ScoreResponse, _Mapping]] = ..., status: _Optional[bytes] = ..., last: _Optional[bool] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("worker", "model", "labels", "incarnation", "conclave_version", "device", "dtype", "parameters", "vocab_size", "max_context", "max_sequences", "max_logprobs", "max_outputs", "model_fingerprint", "tokenizer_fingerprint", "has_chat_template", "precision")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    WORKER_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    CONCLAVE_VERSION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    MAX_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    MAX_OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    HAS_CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    worker: str
    model: str
    labels: _containers.ScalarMap[str, str]
    incarnation: str
    conclave_version: str
    device: str
    dtype: str
    parameters: int
    vocab_size: int
    max_context: int
    max_sequences: int
    max_logprobs: int
    max_outputs: int
    model_fingerprint: str
    tokenizer_fingerprint: str
    has_chat_template: bool
    precision: _generation_pb2.Precision
    def __init__(self, worker: _Optional[str] = ..., model: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., incarnation: _Optional[str] = ..., conclave_version: _Optional[str] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., parameters: _Optional[int] = ..., vocab_size: _Optional[int] = ..., max_context: _Optional[int] = ..., max_sequences: _Optional[int] = ..., max_logprobs: _Optional[int] = ..., max_outputs: _Optional[int] = ..., model_fingerprint: _Optional[str] = ..., tokenizer_fingerprint: _Optional[str] = ..., has_chat_template: _Optional[bool] = ..., precision: _Optional[_Union[_generation_pb2.Precision, _Mapping]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("grace_seconds",)
    GRACE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    grace_seconds: float
    def __init__(self, grace_seconds: _Optional[float] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("completed", "aborted")
    COMPLETED_FIELD_NUMBER: _ClassVar[int]
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    completed: int
    aborted: int
    def __init__(self, completed: _Optional[int] = ..., aborted: _Optional[int] = ...) -> None: ...

class GetLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLoadResponse(_message.Message):
    __slots__ = ("running_sequences", "waiting_sequences", "outstanding_tokens", "pools", "prompt_tokens", "cached_tokens", "completion_tokens", "preemptions", "steps", "tokens_per_second", "draining", "step_age_seconds", "streaming", "experts")
    RUNNING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    WAITING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    OUTSTANDING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    POOLS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    STEP_AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STREAMING_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    running_sequences: int
    waiting_sequences: int
    outstanding_tokens: int
    pools: _containers.RepeatedCompositeFieldContainer[BlockPool]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    preemptions: int
    steps: int
    tokens_per_second: float
    draining: bool
    step_age_seconds: float
    streaming: Streaming
    experts: Experts
    def __init__(self, running_sequences: _Optional[int] = ..., waiting_sequences: _Optional[int] = ..., outstanding_tokens: _Optional[int] = ..., pools: _Optional[_Iterable[_Union[BlockPool, _Mapping]]] = ..., prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., preemptions: _Optional[int] = ..., steps: _Optional[int] = ..., tokens_per_second: _Optional[float] = ..., draining: _Optional[bool] = ..., step_age_seconds: _Optional[float] = ..., streaming: _Optional[_Union[Streaming, _Mapping]] = ..., experts: _Optional[_Union[Experts, _Mapping]] = ...) -> None: ...

class Streaming(_message.Message):
    __slots__ = ("layers", "slots", "host_bytes", "copied_bytes", "stalled_seconds", "coded")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    COPIED_BYTES_FIELD_NUMBER: _ClassVar[int]
    STALLED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CODED_FIELD_NUMBER: _ClassVar[int]
    layers: int
    slots: int
    host_bytes: int
    copied_bytes: int
    stalled_seconds: float
    coded: bool
    def __init__(self, layers: _Optional[int] = ..., slots: _Optional[int] = ..., host_bytes: _Optional[int] = ..., copied_bytes: _Optional[int] = ..., stalled_seconds: _Optional[float] = ..., coded: _Optional[bool] = ...) -> None: ...

class Experts(_message.Message):
    __slots__ = ("layers", "experts", "slots", "host_bytes", "hits", "misses", "foreseen", "foreseen_used", "fetched_bytes", "wasted_bytes", "stalled_seconds")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    FORESEEN_FIELD_NUMBER: _ClassVar[int]
    FORESEEN_USED_FIELD_NUMBER: _ClassVar[int]
    FETCHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    WASTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    STALLED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    layers: int
    experts: int
    slots: int
    host_bytes: int
    hits: int
    misses: int
    foreseen: int
    foreseen_used: int
    fetched_bytes: int
    wasted_bytes: int
    stalled_seconds: float
    def __init__(self, layers: _Optional[int] = ..., experts: _Optional[int] = ..., slots: _Optional[int] = ..., host_bytes: _Optional[int] = ..., hits: _Optional[int] = ..., misses: _Optional[int] = ..., foreseen: _Optional[int] = ..., foreseen_used: _Optional[int] = ..., fetched_bytes: _Optional[int] = ..., wasted_bytes: _Optional[int] = ..., stalled_seconds: _Optional[float] = ...) -> None: ...

class BlockPool(_message.Message):
    __slots__ = ("window", "blocks", "used", "cached", "narrow", "host")
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    NARROW_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    window: int
    blocks: int
    used: int
    cached: int
    narrow: NarrowPool
    host: HostPool
    def __init__(self, window: _Optional[int] = ..., blocks: _Optional[int] = ..., used: _Optional[int] = ..., cached: _Optional[int] = ..., narrow: _Optional[_Union[NarrowPool, _Mapping]] = ..., host: _Optional[_Union[HostPool, _Mapping]] = ...) -> None: ...

class HostPool(_message.Message):
    __slots__ = ("blocks", "used", "spilled", "restored")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    SPILLED_FIELD_NUMBER: _ClassVar[int]
    RESTORED_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    used: int
    spilled: int
    restored: int
    def __init__(self, blocks: _Optional[int] = ..., used: _Optional[int] = ..., spilled: _Optional[int] = ..., restored: _Optional[int] = ...) -> None: ...

class NarrowPool(_message.Message):
    __slots__ = ("bits", "rows", "used", "layers")
    BITS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    bits: int
    rows: int
    used: int
    layers: _containers.RepeatedCompositeFieldContainer[NarrowLayer]
    def __init__(self, bits: _Optional[int] = ..., rows: _Optional[int] = ..., used: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[NarrowLayer, _Mapping]]] = ...) -> None: ...

class NarrowLayer(_message.Message):
    __slots__ = ("layer", "heads", "seconds", "largest")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    LARGEST_FIELD_NUMBER: _ClassVar[int]
    layer: int
    heads: int
    seconds: int
    largest: float
    def __init__(self, layer: _Optional[int] = ..., heads: _Optional[int] = ..., seconds: _Optional[int] = ..., largest: _Optional[float] = ...) -> None: ...
