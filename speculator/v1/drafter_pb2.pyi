import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.rpc import status_pb2 as _status_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class VerificationRule(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VERIFICATION_RULE_UNSPECIFIED: _ClassVar[VerificationRule]
    VERIFICATION_RULE_COUPLED: _ClassVar[VerificationRule]
    VERIFICATION_RULE_REJECTION: _ClassVar[VerificationRule]
    VERIFICATION_RULE_BLOCK: _ClassVar[VerificationRule]

class DraftDistribution(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DRAFT_DISTRIBUTION_UNSPECIFIED: _ClassVar[DraftDistribution]
    DRAFT_DISTRIBUTION_SERVER_SIDE: _ClassVar[DraftDistribution]
    DRAFT_DISTRIBUTION_POINT_MASS: _ClassVar[DraftDistribution]
    DRAFT_DISTRIBUTION_SPARSE: _ClassVar[DraftDistribution]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_CANCELLED: _ClassVar[FinishReason]
VERIFICATION_RULE_UNSPECIFIED: VerificationRule
VERIFICATION_RULE_COUPLED: VerificationRule
VERIFICATION_RULE_REJECTION: VerificationRule
VERIFICATION_RULE_BLOCK: VerificationRule
DRAFT_DISTRIBUTION_UNSPECIFIED: DraftDistribution
DRAFT_DISTRIBUTION_SERVER_SIDE: DraftDistribution
DRAFT_DISTRIBUTION_POINT_MASS: DraftDistribution
DRAFT_DISTRIBUTION_SPARSE: DraftDistribution
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_CANCELLED: FinishReason

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "verification_rule")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    VERIFICATION_RULE_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    repetition_penalty: float
    verification_rule: VerificationRule
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., repetition_penalty: _Optional[float] = ..., verification_rule: _Optional[_Union[VerificationRule, str]] = ...) -> None: ...

class StoppingParams(_message.Message):
    __slots__ = ("max_new_tokens", "stop_token_ids", "ignore_eos")
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    max_new_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    def __init__(self, max_new_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: bool = ...) -> None: ...

class DraftParams(_message.Message):
    __slots__ = ("max_depth", "max_nodes", "branching", "distribution", "static_parents")
    MAX_DEPTH_FIELD_NUMBER: _ClassVar[int]
    MAX_NODES_FIELD_NUMBER: _ClassVar[int]
    BRANCHING_FIELD_NUMBER: _ClassVar[int]
    DISTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    STATIC_PARENTS_FIELD_NUMBER: _ClassVar[int]
    max_depth: int
    max_nodes: int
    branching: int
    distribution: DraftDistribution
    static_parents: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, max_depth: _Optional[int] = ..., max_nodes: _Optional[int] = ..., branching: _Optional[int] = ..., distribution: _Optional[_Union[DraftDistribution, str]] = ..., static_parents: _Optional[_Iterable[int]] = ...) -> None: ...

class DraftTree(_message.Message):
    __slots__ = ("token_ids", "parent_indices", "logprobs", "distribution", "support_counts", "support_token_ids", "support_logprobs")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PARENT_INDICES_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    DISTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    SUPPORT_COUNTS_FIELD_NUMBER: _ClassVar[int]
    SUPPORT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SUPPORT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    parent_indices: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    distribution: DraftDistribution
    support_counts: _containers.RepeatedScalarFieldContainer[int]
    support_token_ids: _containers.RepeatedScalarFieldContainer[int]
    support_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., parent_indices: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., distribution: _Optional[_Union[DraftDistribution, str]] = ..., support_counts: _Optional[_Iterable[int]] = ..., support_token_ids: _Optional[_Iterable[int]] = ..., support_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class Session(_message.Message):
    __slots__ = ("session_id", "model", "committed_length", "finish_reason", "expire_time", "stats", "instance_id")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_LENGTH_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    model: str
    committed_length: int
    finish_reason: FinishReason
    expire_time: _timestamp_pb2.Timestamp
    stats: AcceptanceStats
    instance_id: str
    def __init__(self, session_id: _Optional[str] = ..., model: _Optional[str] = ..., committed_length: _Optional[int] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., expire_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., stats: _Optional[_Union[AcceptanceStats, _Mapping]] = ..., instance_id: _Optional[str] = ...) -> None: ...

class AcceptanceStats(_message.Message):
    __slots__ = ("num_steps", "num_draft_tokens", "num_accepted_draft_tokens", "acceptance_histogram", "num_output_tokens", "accepted_at_position", "drafted_at_position")
    class AcceptanceHistogramEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: int
        def __init__(self, key: _Optional[int] = ..., value: _Optional[int] = ...) -> None: ...
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTANCE_HISTOGRAM_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_AT_POSITION_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_AT_POSITION_FIELD_NUMBER: _ClassVar[int]
    num_steps: int
    num_draft_tokens: int
    num_accepted_draft_tokens: int
    acceptance_histogram: _containers.ScalarMap[int, int]
    num_output_tokens: int
    accepted_at_position: _containers.RepeatedScalarFieldContainer[int]
    drafted_at_position: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, num_steps: _Optional[int] = ..., num_draft_tokens: _Optional[int] = ..., num_accepted_draft_tokens: _Optional[int] = ..., acceptance_histogram: _Optional[_Mapping[int, int]] = ..., num_output_tokens: _Optional[int] = ..., accepted_at_position: _Optional[_Iterable[int]] = ..., drafted_at_position: _Optional[_Iterable[int]] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("queue_us", "draft_us", "verify_us", "batch_size", "total_us")
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    DRAFT_US_FIELD_NUMBER: _ClassVar[int]
    VERIFY_US_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_US_FIELD_NUMBER: _ClassVar[int]
    queue_us: int
    draft_us: int
    verify_us: int
    batch_size: int
    total_us: int
    def __init__(self, queue_us: _Optional[int] = ..., draft_us: _Optional[int] = ..., verify_us: _Optional[int] = ..., batch_size: _Optional[int] = ..., total_us: _Optional[int] = ...) -> None: ...

class CreateSessionRequest(_message.Message):
    __slots__ = ("session_id", "model", "token_ids", "text", "sampling", "stopping", "draft", "idle_timeout", "disable_speculation", "prefill_only")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOPPING_FIELD_NUMBER: _ClassVar[int]
    DRAFT_FIELD_NUMBER: _ClassVar[int]
    IDLE_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    DISABLE_SPECULATION_FIELD_NUMBER: _ClassVar[int]
    PREFILL_ONLY_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    model: str
    token_ids: TokenIds
    text: str
    sampling: SamplingParams
    stopping: StoppingParams
    draft: DraftParams
    idle_timeout: _duration_pb2.Duration
    disable_speculation: bool
    prefill_only: bool
    def __init__(self, session_id: _Optional[str] = ..., model: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., text: _Optional[str] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., stopping: _Optional[_Union[StoppingParams, _Mapping]] = ..., draft: _Optional[_Union[DraftParams, _Mapping]] = ..., idle_timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., disable_speculation: bool = ..., prefill_only: bool = ...) -> None: ...

class CreateSessionResponse(_message.Message):
    __slots__ = ("session", "next_token_id", "cached_prompt_tokens", "timing", "replayed")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    NEXT_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    CACHED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    session: Session
    next_token_id: int
    cached_prompt_tokens: int
    timing: Timing
    replayed: bool
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., next_token_id: _Optional[int] = ..., cached_prompt_tokens: _Optional[int] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., replayed: bool = ...) -> None: ...

class GetSessionRequest(_message.Message):
    __slots__ = ("session_id", "include_token_ids")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    include_token_ids: bool
    def __init__(self, session_id: _Optional[str] = ..., include_token_ids: bool = ...) -> None: ...

class GetSessionResponse(_message.Message):
    __slots__ = ("session", "token_ids")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    session: Session
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class DeleteSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class DeleteSessionResponse(_message.Message):
    __slots__ = ("stats",)
    STATS_FIELD_NUMBER: _ClassVar[int]
    stats: AcceptanceStats
    def __init__(self, stats: _Optional[_Union[AcceptanceStats, _Mapping]] = ...) -> None: ...

class ProposeRequest(_message.Message):
    __slots__ = ("session_id", "base_length", "draft", "return_logprobs")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    BASE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    DRAFT_FIELD_NUMBER: _ClassVar[int]
    RETURN_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    base_length: int
    draft: DraftParams
    return_logprobs: bool
    def __init__(self, session_id: _Optional[str] = ..., base_length: _Optional[int] = ..., draft: _Optional[_Union[DraftParams, _Mapping]] = ..., return_logprobs: bool = ...) -> None: ...

class ProposeResponse(_message.Message):
    __slots__ = ("draft_id", "tree", "timing", "base_length")
    DRAFT_ID_FIELD_NUMBER: _ClassVar[int]
    TREE_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    BASE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    draft_id: int
    tree: DraftTree
    timing: Timing
    base_length: int
    def __init__(self, draft_id: _Optional[int] = ..., tree: _Optional[_Union[DraftTree, _Mapping]] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., base_length: _Optional[int] = ...) -> None: ...

class VerifyRequest(_message.Message):
    __slots__ = ("session_id", "base_length", "draft_id", "tree", "return_logprobs", "propose_next")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    BASE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    DRAFT_ID_FIELD_NUMBER: _ClassVar[int]
    TREE_FIELD_NUMBER: _ClassVar[int]
    RETURN_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROPOSE_NEXT_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    base_length: int
    draft_id: int
    tree: DraftTree
    return_logprobs: bool
    propose_next: DraftParams
    def __init__(self, session_id: _Optional[str] = ..., base_length: _Optional[int] = ..., draft_id: _Optional[int] = ..., tree: _Optional[_Union[DraftTree, _Mapping]] = ..., return_logprobs: bool = ..., propose_next: _Optional[_Union[DraftParams, _Mapping]] = ...) -> None: ...

class VerifyResponse(_message.Message):
    __slots__ = ("accepted_indices", "committed_token_ids", "committed_logprobs", "committed_length", "finish_reason", "next_draft", "replayed", "timing", "verification_rule")
    ACCEPTED_INDICES_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_LENGTH_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    NEXT_DRAFT_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    VERIFICATION_RULE_FIELD_NUMBER: _ClassVar[int]
    accepted_indices: _containers.RepeatedScalarFieldContainer[int]
    committed_token_ids: _containers.RepeatedScalarFieldContainer[int]
    committed_logprobs: _containers.RepeatedScalarFieldContainer[float]
    committed_length: int
    finish_reason: FinishReason
    next_draft: ProposeResponse
    replayed: bool
    timing: Timing
    verification_rule: VerificationRule
    def __init__(self, accepted_indices: _Optional[_Iterable[int]] = ..., committed_token_ids: _Optional[_Iterable[int]] = ..., committed_logprobs: _Optional[_Iterable[float]] = ..., committed_length: _Optional[int] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., next_draft: _Optional[_Union[ProposeResponse, _Mapping]] = ..., replayed: bool = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., verification_rule: _Optional[_Union[VerificationRule, str]] = ...) -> None: ...

class ExtendRequest(_message.Message):
    __slots__ = ("session_id", "base_length", "token_ids", "propose_next")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    BASE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROPOSE_NEXT_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    base_length: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    propose_next: DraftParams
    def __init__(self, session_id: _Optional[str] = ..., base_length: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., propose_next: _Optional[_Union[DraftParams, _Mapping]] = ...) -> None: ...

class ExtendResponse(_message.Message):
    __slots__ = ("committed_length", "finish_reason", "next_draft", "replayed", "timing")
    COMMITTED_LENGTH_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    NEXT_DRAFT_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    committed_length: int
    finish_reason: FinishReason
    next_draft: ProposeResponse
    replayed: bool
    timing: Timing
    def __init__(self, committed_length: _Optional[int] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., next_draft: _Optional[_Union[ProposeResponse, _Mapping]] = ..., replayed: bool = ..., timing: _Optional[_Union[Timing, _Mapping]] = ...) -> None: ...

class DraftRequest(_message.Message):
    __slots__ = ("correlation_id", "timeout", "create_session", "propose", "verify", "delete_session", "extend")
    CORRELATION_ID_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    CREATE_SESSION_FIELD_NUMBER: _ClassVar[int]
    PROPOSE_FIELD_NUMBER: _ClassVar[int]
    VERIFY_FIELD_NUMBER: _ClassVar[int]
    DELETE_SESSION_FIELD_NUMBER: _ClassVar[int]
    EXTEND_FIELD_NUMBER: _ClassVar[int]
    correlation_id: int
    timeout: _duration_pb2.Duration
    create_session: CreateSessionRequest
    propose: ProposeRequest
    verify: VerifyRequest
    delete_session: DeleteSessionRequest
    extend: ExtendRequest
    def __init__(self, correlation_id: _Optional[int] = ..., timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., create_session: _Optional[_Union[CreateSessionRequest, _Mapping]] = ..., propose: _Optional[_Union[ProposeRequest, _Mapping]] = ..., verify: _Optional[_Union[VerifyRequest, _Mapping]] = ..., delete_session: _Optional[_Union[DeleteSessionRequest, _Mapping]] = ..., extend: _Optional[_Union[ExtendRequest, _Mapping]] = ...) -> None: ...

class DraftResponse(_message.Message):
    __slots__ = ("correlation_id", "status", "create_session", "propose", "verify", "delete_session", "extend", "draining")
    CORRELATION_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    CREATE_SESSION_FIELD_NUMBER: _ClassVar[int]
    PROPOSE_FIELD_NUMBER: _ClassVar[int]
    VERIFY_FIELD_NUMBER: _ClassVar[int]
    DELETE_SESSION_FIELD_NUMBER: _ClassVar[int]
    EXTEND_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    correlation_id: int
    status: _status_pb2.Status
    create_session: CreateSessionResponse
    propose: ProposeResponse
    verify: VerifyResponse
    delete_session: DeleteSessionResponse
    extend: ExtendResponse
    draining: Draining
    def __init__(self, correlation_id: _Optional[int] = ..., status: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., create_session: _Optional[_Union[CreateSessionResponse, _Mapping]] = ..., propose: _Optional[_Union[ProposeResponse, _Mapping]] = ..., verify: _Optional[_Union[VerifyResponse, _Mapping]] = ..., delete_session: _Optional[_Union[DeleteSessionResponse, _Mapping]] = ..., extend: _Optional[_Union[ExtendResponse, _Mapping]] = ..., draining: _Optional[_Union[Draining, _Mapping]] = ...) -> None: ...

class Draining(_message.Message):
    __slots__ = ("grace",)
    GRACE_FIELD_NUMBER: _ClassVar[int]
    grace: _duration_pb2.Duration
    def __init__(self, grace: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("session", "disable_speculation")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    DISABLE_SPECULATION_FIELD_NUMBER: _ClassVar[int]
    session: CreateSessionRequest
    disable_speculation: bool
    def __init__(self, session: _Optional[_Union[CreateSessionRequest, _Mapping]] = ..., disable_speculation: bool = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("token_ids", "logprobs", "num_accepted", "finish_reason", "stats", "timing", "text", "session")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    num_accepted: int
    finish_reason: FinishReason
    stats: AcceptanceStats
    timing: Timing
    text: str
    session: Session
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., num_accepted: _Optional[int] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., stats: _Optional[_Union[AcceptanceStats, _Mapping]] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., text: _Optional[str] = ..., session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...
