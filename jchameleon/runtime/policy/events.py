"""What happened since the last plan: the only input that changes a planner."""

import dataclasses
from typing import TypeAlias

from jchameleon.runtime.policy.request import Request


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    """A validated request joins the waiting line."""

    request: Request


@dataclasses.dataclass(frozen=True, slots=True)
class Cancel:
    """The caller went away; an id that is unknown or already ended is ignored."""

    request_id: str


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterRegistered:
    """An adapter may be named by requests from now on; a known uid is ignored.

    Attributes:
      rank: its largest rank over modules and layers.
      num_pages: device pages that it takes when resident.
    """

    uid: str
    rank: int
    num_pages: int

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")
        if self.num_pages < 1:
            raise ValueError(f"num_pages={self.num_pages} must be at least 1")


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterUnregistered:
    """No request names an adapter any more, nor will one: forget it.

    Legal only when none waits or runs for it. A resident copy is evicted, a pin ends; a
    copy under way is dropped when it arrives. `Plan.forgotten` says when all is done;
    registering the uid before that keeps it as it is.
    """

    uid: str


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterPinned:
    """From now on an adapter is kept on the device, or is evictable again.

    A pinned adapter that is absent is loaded as soon as its pages are to be had; if
    that load fails, the next request for it tries again.
    """

    uid: str
    pinned: bool


@dataclasses.dataclass(frozen=True, slots=True)
class LoadDone:
    """A load that a plan started has arrived, or failed with the reason `error`.

    Attributes:
      fault: what kind of reason; requests that fail for it have it in their plan.
    """

    uid: str
    error: str | None = None
    fault: str = "internal"


@dataclasses.dataclass(frozen=True, slots=True)
class StepDone:
    """The engine ran one plan.

    Attributes:
      duration_s: wall time of the step.
      produced: (request id, tokens sampled for it in this step).
      finished: ids of requests that ended in this step, for any reason.
      block_keys: (request id, key) of blocks that the step filled with output, for
        requests that take part in the prefix cache, in their order.
      spoiled: ids of those of `finished` whose logits were not finite. Whatever their
        adapter has in the prefix cache is dropped, for it may be the reason, and would
        be for everyone to come.
    """

    duration_s: float
    produced: tuple[tuple[str, int], ...] = ()
    finished: tuple[str, ...] = ()
    block_keys: tuple[tuple[str, str], ...] = ()
    spoiled: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceLost:
    """What the device held is gone: KV entries and adapters, not copies under way.

    All that ran waits again, with what it had produced. If it was lost in a step, the
    `StepDone` of that one follows, if there is one, and names what was saved of it.
    """


Event: TypeAlias = (
    Arrival
    | Cancel
    | AdapterRegistered
    | AdapterUnregistered
    | AdapterPinned
    | LoadDone
    | StepDone
    | DeviceLost
)
