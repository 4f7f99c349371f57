"""Recent traffic, and the lanes that it asks for."""

from collections import deque
from typing import Literal

import numpy as np

from jchameleon.config import is_number
from jchameleon.errors import ConfigError
from jchameleon.runtime.policy.estimator import Estimator
from jchameleon.runtime.policy.kmeans import cluster, elbow, least_wcss
from jchameleon.runtime.policy.lanes import Entry, Lane, least_tokens
from jchameleon.runtime.policy.wrs import LargestSeen

_MOST_LANES = 16
_MOST_WINDOW = 1024  # clustering takes time and memory with its square
_LEAST_SPAN_S = 1e-3  # a window that arrived within one iteration spans no time


class Traffic:
    """The latest requests, and the largest of all so far.

    Args: see the options of `Chameleon`.

    Raises:
      ConfigError: one of them is out of its range.
    """

    def __init__(
        self,
        *,
        window_requests: int,
        max_lanes: int,
        lanes: Literal["kmeans", "elbow", "static"],
        elbow_gain: float,
        slo_s: float,
    ) -> None:
        if type(window_requests) is not int or not 1 <= window_requests <= _MOST_WINDOW:
            raise ConfigError(
                f"window_requests={window_requests!r} must be an integer, 1 to "
                f"{_MOST_WINDOW}"
            )
        if type(max_lanes) is not int or not 1 <= max_lanes <= _MOST_LANES:
            raise ConfigError(
                f"max_lanes={max_lanes!r} must be an integer, 1 to {_MOST_LANES}"
            )
        if lanes not in ("kmeans", "elbow", "static"):
            raise ConfigError(f"lanes={lanes!r} must be 'kmeans', 'elbow' or 'static'")
        if not is_number(elbow_gain) or not 0 < elbow_gain < 1:
            raise ConfigError(f"elbow_gain={elbow_gain!r} must be between 0 and 1")
        if not is_number(slo_s) or slo_s < 1e-6:
            raise ConfigError(
                f"slo_s={slo_s!r} must be a finite number of seconds, above 1e-6"
            )
        self._max_lanes = max_lanes
        self._rule = lanes
        self._elbow_gain = elbow_gain
        self._slo_s = slo_s
        # (arrival, prompt, predicted output, chunks, adapter pages) of each request.
        self._window: deque[tuple[float, int, int, int, int]] = deque(
            maxlen=window_requests
        )
        self.largest = LargestSeen()

    def add(self, now_s: float, entry: Entry) -> None:
        """Note an arrival."""
        self._window.append(
            (
                now_s,
                entry.request.prompt_tokens,
                entry.predicted_tokens,
                entry.chunks,
                entry.adapter_pages,
            )
        )

    def cut_lanes(
        self, now_s: float, *, block_tokens: int, estimator: Estimator
    ) -> list[Lane]:
        """Return new lanes, smallest first, with the quotas that they ask for.

        Sizes are measured against the largest of today, not of when they arrived. A
        lane's time of service is that of its requests alone on the engine, with the
        load of the adapter. One without a request in the window asks for nothing.
        """
        window = np.array(self._window, np.float64)
        arrival_s, prompt, predicted, chunks, pages = window.T
        sizes = self.largest.wrs(prompt, predicted, chunks)
        costs = prompt + predicted + pages * block_tokens
        service_s = np.array(
            [
                estimator.run_s(
                    prefill_tokens=prompt, output_tokens=predicted, load_pages=pages
                )
                for _, prompt, predicted, _, pages in self._window
            ]
        )
        span_s = max(now_s - float(arrival_s[0]), _LEAST_SPAN_S)
        cut_offs = self._cut_offs(sizes)
        lane_of = np.searchsorted(cut_offs, sizes)
        lanes = []
        for index, upper_wrs in enumerate([*cut_offs, float("inf")]):
            mine = lane_of == index
            least = 0.0
            if mine.any():
                least = least_tokens(
                    largest_tokens=float(costs[mine].max()),
                    service_s=float(service_s[mine].mean()),
                    arrivals_per_s=int(mine.sum()) / span_s,
                    slo_s=self._slo_s,
                )
            lanes.append(Lane(upper_wrs=upper_wrs, least_tokens=least))
        return lanes

    def _cut_offs(self, sizes: np.ndarray) -> list[float]:
        if self._rule == "static":
            return [i / self._max_lanes for i in range(1, self._max_lanes)]
        clusterings = cluster(sizes, self._max_lanes)
        if self._rule == "elbow":
            return elbow(clusterings, self._elbow_gain).cut_offs()
        return least_wcss(clusterings).cut_offs()
