"""After a step that failed: who runs apart until it is known whose fault it was.

The requests that were in it run apart from all others from then on, as a step of their
own within each iteration. If that fails again it is cut in halves, and so on down to a
single request, which is to blame. Tokens do not depend on who shares a step, so nobody
else notices.
"""

import dataclasses
from collections.abc import Container, Iterator

from jchameleon.runtime.policy.plan import Plan

PROBATION_STEPS = 8
"""Decode steps that requests run apart before what failed counts as gone."""


@dataclasses.dataclass(slots=True, eq=False)
class _Group:
    """Requests that were in a step that failed.

    Attributes:
      passed_steps: decode steps that they have run since.
    """

    ids: frozenset[str]
    passed_steps: int = 0


class Suspects:
    """Cuts plans into steps. Engine thread only."""

    def __init__(self) -> None:
        """Start without suspects: a plan is one step."""
        self._groups: list[_Group] = []

    def steps(self, plan: Plan, live: Container[str]) -> Iterator[Plan]:
        """Yield the parts of a plan that are to run as steps, one after another.

        Args:
          live: requests that have not ended; looked at again before each step.
        """
        if not self._groups:
            yield plan
            return
        self._groups = [g for g in self._groups if any(i in live for i in g.ids)]
        planned = ids_of(plan)
        suspects = [group.ids for group in self._groups]
        for ids in (planned.difference(*suspects), *suspects):
            part = part_of(plan, frozenset(i for i in ids if i in live))
            if part.prefill or part.decode:
                yield part

    def passed(self, step: Plan) -> None:
        """Note that a step ran; who has run for long enough is no suspect any more."""
        group = self._find(step) if self._groups else None
        # While prompts run again, what failed may be still to come.
        if group is not None and not step.prefill:
            group.passed_steps += 1
            if group.passed_steps == PROBATION_STEPS:
                self._groups.remove(group)

    def failed(self, step: Plan) -> str | None:
        """Note that a step failed; return the request that is to blame, if known."""
        ids, group = ids_of(step), self._find(step)
        if group is None:
            self._groups.append(_Group(ids))  # once more as it was
            return None
        self._groups.remove(group)
        if len(group.ids) == 1:
            return next(iter(ids))
        if len(ids) == 1:  # the first of its group to run: one failure may be chance
            self._groups.append(_Group(ids))
            return None
        order = [*dict.fromkeys([*(c.request_id for c in step.prefill), *step.decode])]
        for half in (order[: len(ids) // 2], order[len(ids) // 2 :]):
            self._groups.append(_Group(frozenset(half)))
        return None

    def _find(self, step: Plan) -> _Group | None:
        ids = ids_of(step)
        return next((group for group in self._groups if ids <= group.ids), None)


def ids_of(plan: Plan) -> frozenset[str]:
    """Return the requests that a plan runs."""
    return frozenset((*(c.request_id for c in plan.prefill), *plan.decode))


def part_of(plan: Plan, ids: frozenset[str]) -> Plan:
    """Return what a plan runs of some requests, and nothing else of it."""
    return Plan(
        prefill=tuple(chunk for chunk in plan.prefill if chunk.request_id in ids),
        decode=tuple(request_id for request_id in plan.decode if request_id in ids),
    )
