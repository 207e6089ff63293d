from conclave.protos import ensemble_pb2 as _ensemble_pb2
from conclave.protos import generation_pb2 as _generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_STATE_UNSPECIFIED: _ClassVar[WorkerState]
    WORKER_STATE_STARTING: _ClassVar[WorkerState]
    WORKER_STATE_SERVING: _ClassVar[WorkerState]
    WORKER_STATE_DRAINING: _ClassVar[WorkerState]
    WORKER_STATE_DOWN: _ClassVar[WorkerState]
WORKER_STATE_UNSPECIFIED: WorkerState
WORKER_STATE_STARTING: WorkerState
WORKER_STATE_SERVING: WorkerState
WORKER_STATE_DRAINING: WorkerState
WORKER_STATE_DOWN: WorkerState

class Handling(_message.Message):
    __slots__ = ("priority", "session", "resume")
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    priority: int
    session: str
    resume: bool
    def __init__(self, priority: _Optional[int] = ..., session: _Optional[str] = ..., resume: _Optional[bool] = ...) -> None: ...

class GatewayGenerateRequest(_message.Message):
    __slots__ = ("request", "selector", "ensemble", "preset", "handling")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    ENSEMBLE_FIELD_NUMBER: _ClassVar[int]
    PRESET_FIELD_NUMBER: _ClassVar[int]
    HANDLING_FIELD_NUMBER: _ClassVar[int]
    request: _generation_pb2.GenerateRequest
    selector: _ensemble_pb2.WorkerSelector
    ensemble: _ensemble_pb2.EnsembleSpec
    preset: str
    handling: Handling
    def __init__(self, request: _Optional[_Union[_generation_pb2.GenerateRequest, _Mapping]] = ..., selector: _Optional[_Union[_ensemble_pb2.WorkerSelector, _Mapping]] = ..., ensemble: _Optional[_Union[_ensemble_pb2.EnsembleSpec, _Mapping]] = ..., preset: _Optional[str] = ..., handling: _Optional[_Union[Handling, _Mapping]] = ...) -> None: ...

class CompleteRequest(_message.Message):
    __slots__ = ("request", "selector", "ensemble", "preset", "handling")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    ENSEMBLE_FIELD_NUMBER: _ClassVar[int]
    PRESET_FIELD_NUMBER: _ClassVar[int]
    HANDLING_FIELD_NUMBER: _ClassVar[int]
    request: _generation_pb2.GenerateRequest
    selector: _ensemble_pb2.WorkerSelector
    ensemble: _ensemble_pb2.EnsembleSpec
    preset: str
    handling: Handling
    def __init__(self, request: _Optional[_Union[_generation_pb2.GenerateRequest, _Mapping]] = ..., selector: _Optional[_Union[_ensemble_pb2.WorkerSelector, _Mapping]] = ..., ensemble: _Optional[_Union[_ensemble_pb2.EnsembleSpec, _Mapping]] = ..., preset: _Optional[str] = ..., handling: _Optional[_Union[Handling, _Mapping]] = ...) -> None: ...

class GatewayScoreRequest(_message.Message):
    __slots__ = ("request", "selector", "handling")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    HANDLING_FIELD_NUMBER: _ClassVar[int]
    request: _generation_pb2.ScoreRequest
    selector: _ensemble_pb2.WorkerSelector
    handling: Handling
    def __init__(self, request: _Optional[_Union[_generation_pb2.ScoreRequest, _Mapping]] = ..., selector: _Optional[_Union[_ensemble_pb2.WorkerSelector, _Mapping]] = ..., handling: _Optional[_Union[Handling, _Mapping]] = ...) -> None: ...

class WorkerInfo(_message.Message):
    __slots__ = ("name", "state", "address", "model", "labels", "incarnation", "device", "open_requests", "served_requests", "restarts", "reason", "process", "outstanding_tokens", "tokens_per_second", "broken", "precision")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    OPEN_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    SERVED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    OUTSTANDING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    BROKEN_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: WorkerState
    address: str
    model: str
    labels: _containers.ScalarMap[str, str]
    incarnation: str
    device: str
    open_requests: int
    served_requests: int
    restarts: int
    reason: str
    process: int
    outstanding_tokens: int
    tokens_per_second: float
    broken: bool
    precision: _generation_pb2.Precision
    def __init__(self, name: _Optional[str] = ..., state: _Optional[_Union[WorkerState, str]] = ..., address: _Optional[str] = ..., model: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., incarnation: _Optional[str] = ..., device: _Optional[str] = ..., open_requests: _Optional[int] = ..., served_requests: _Optional[int] = ..., restarts: _Optional[int] = ..., reason: _Optional[str] = ..., process: _Optional[int] = ..., outstanding_tokens: _Optional[int] = ..., tokens_per_second: _Optional[float] = ..., broken: _Optional[bool] = ..., precision: _Optional[_Union[_generation_pb2.Precision, _Mapping]] = ...) -> None: ...

class ListWorkersRequest(_message.Message):
    __slots__ = ("selector",)
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    selector: _ensemble_pb2.WorkerSelector
    def __init__(self, selector: _Optional[_Union[_ensemble_pb2.WorkerSelector, _Mapping]] = ...) -> None: ...

class ListWorkersResponse(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerInfo]
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerInfo, _Mapping]]] = ...) -> None: ...

class GetFleetRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetFleetResponse(_message.Message):
    __slots__ = ("name", "conclave_version", "desired_workers", "serving_workers", "models", "requests", "retries", "failures", "uptime_seconds", "resumes", "hedges", "rejections", "queued_requests", "presets")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONCLAVE_VERSION_FIELD_NUMBER: _ClassVar[int]
    DESIRED_WORKERS_FIELD_NUMBER: _ClassVar[int]
    SERVING_WORKERS_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    RETRIES_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RESUMES_FIELD_NUMBER: _ClassVar[int]
    HEDGES_FIELD_NUMBER: _ClassVar[int]
    REJECTIONS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    PRESETS_FIELD_NUMBER: _ClassVar[int]
    name: str
    conclave_version: str
    desired_workers: int
    serving_workers: int
    models: _containers.RepeatedScalarFieldContainer[str]
    requests: int
    retries: int
    failures: int
    uptime_seconds: float
    resumes: int
    hedges: int
    rejections: int
    queued_requests: int
    presets: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., conclave_version: _Optional[str] = ..., desired_workers: _Optional[int] = ..., serving_workers: _Optional[int] = ..., models: _Optional[_Iterable[str]] = ..., requests: _Optional[int] = ..., retries: _Optional[int] = ..., failures: _Optional[int] = ..., uptime_seconds: _Optional[float] = ..., resumes: _Optional[int] = ..., hedges: _Optional[int] = ..., rejections: _Optional[int] = ..., queued_requests: _Optional[int] = ..., presets: _Optional[_Iterable[str]] = ...) -> None: ...
