"""Steps that may fail: the engine goes on, without the request that made them fail.

A failed step may have taken the pool with it, which is donated to every program. So the
pool is built anew, everything that ran is computed again from the tokens that the host
holds, and `Suspects` finds out whose fault it was if the same happens again.
"""

import logging
from collections.abc import Callable

from jchameleon.runtime.executor import Executor
from jchameleon.runtime.policy.events import DeviceLost, Event
from jchameleon.runtime.policy.plan import Plan
from jchameleon.runtime.replies import Replies
from jchameleon.runtime.step import StepOutput, run_step
from jchameleon.runtime.suspects import Suspects, ids_of

logger = logging.getLogger(__name__)


class Recovery:
    """Runs plans, and starts over where that fails. Engine thread only."""

    def __init__(
        self, executor: Executor, replies: Replies, *, report: Callable[[Event], None]
    ) -> None:
        """`report` takes what the planner is to hear."""
        self._executor = executor
        self._replies = replies
        self._report = report
        self._suspects = Suspects()

    def run(self, plan: Plan) -> StepOutput:
        """Run a plan in one step, or in several while there are suspects.

        Ends with the first step that fails; returns what those before it produced.

        Raises:
          Exception: the device is not fit for anything any more.
        """
        output, replies = StepOutput(drawn=[], scored=[], device_s=0.0), self._replies
        for step in self._suspects.steps(plan, replies.live):
            try:
                output += run_step(
                    self._executor, replies.live, step, meanwhile=replies.deliver
                )
            except Exception as error:
                self._recover(step, error)
                break
            self._suspects.passed(step)
        return output

    def start_over(self) -> None:
        """Give up what the device holds; the next plan has it computed again."""
        self._executor.rebuild_pool()
        self._report(DeviceLost())

    def _recover(self, step: Plan, error: Exception) -> None:
        logger.error("a step of %d requests failed", len(ids_of(step)), exc_info=error)
        self.start_over()
        culprit = self._suspects.failed(step)
        if culprit is not None:
            # It failed alone, and before: by itself, or because nothing works any more.
            self._executor.test_device()
            self._replies.fail(culprit, error)
