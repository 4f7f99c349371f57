"""EngineService: what the engine is and does, and ending requests from outside."""

import asyncio
import math
from collections.abc import Callable

import grpc
import jax

from jchameleon import __version__
from jchameleon.llm import LLM
from jchameleon.outputs import EngineStats
from jchameleon.serving.compiles import CompileCounter
from jchameleon.serving.engine_reader import EngineReader
from jchameleon.serving.front import Call
from jchameleon.serving.proto.jchameleon.v1 import engine_pb2 as pb
from jchameleon.serving.settings import ServerConfig
from jchameleon.serving.status import StatusError
from jchameleon.serving.streams import LoopOutbox

ANSWER_S = 5.0
"""An engine that does not answer questions for so long hangs in a step."""


class EngineService:
    """Answers about the engine; event loop only."""

    def __init__(
        self,
        config: ServerConfig,
        llm: Callable[[], LLM],
        outbox: LoopOutbox,
        compiles: CompileCounter,
        reader: EngineReader,
    ) -> None:
        """Create the service.

        Args:
          llm: returns the model, or raises the StatusError that says why not now.
        """
        self._config = config
        self._llm = llm
        self._outbox = outbox
        self._compiles = compiles
        self._reader = reader

    async def get_server_info(
        self, request: pb.GetServerInfoRequest, context: Call
    ) -> pb.GetServerInfoResponse:
        """Return what does not change while the server runs."""
        llm, config = self._llm(), self._config
        facts = llm.facts()
        return pb.GetServerInfoResponse(
            version=__version__,
            jax_version=jax.__version__,
            model=llm.model_config.name,
            device=facts.device,
            backend=facts.backend,
            dtype=facts.dtype,
            vocab_size=llm.model_config.vocab_size,
            max_model_len=llm.max_model_len,
            max_running=config.engine.max_running,
            max_lora_rank=config.engine.max_lora_rank,
            lora_targets=facts.lora_targets,
            has_tokenizer=llm.tokenizer is not None,
            has_chat_template=llm.has_chat_template,
            dynamic_adapters=config.adapters.dynamic,
            pool_bytes=facts.pool_bytes,
            policy=facts.policy,
            max_waiting_requests=config.limits.max_waiting_requests,
            max_waiting_tokens=config.limits.max_waiting_tokens,
        )

    async def get_stats(
        self, request: pb.GetStatsRequest, context: Call
    ) -> pb.GetStatsResponse:
        """Return the engine's totals.

        Raises:
          StatusError: UNAVAILABLE, the engine does not answer now.
        """
        llm = self._llm()
        reading = asyncio.wrap_future(self._reader.read())
        done, _ = await asyncio.wait([reading], timeout=ANSWER_S)
        if not done:
            raise StatusError(
                grpc.StatusCode.UNAVAILABLE,
                "ENGINE_STALLED",
                f"the engine has not answered for {ANSWER_S:g} s",
                retry_after_s=ANSWER_S,
            )
        snapshot = reading.result()
        stats = snapshot.stats
        pinned = {one.uid: one.size_bytes for one in snapshot.adapters if one.pinned}
        return pb.GetStatsResponse(
            cache=_cache(stats, sum(pinned.values())),
            queues=_queues(stats),
            kv=pb.KvStats(
                used_bytes=stats.kv_pages * stats.page_bytes,
                cached_bytes=stats.cached_pages * stats.page_bytes,
                prefix_queried_tokens=stats.prefix_queried_tokens,
                prefix_hit_tokens=stats.prefix_hit_tokens,
            ),
            engine=pb.EngineStats(
                last_progress_age_seconds=llm.engine.heartbeat().stalled_s,
                waiting=stats.waiting,
                running=stats.running,
                preemptions=stats.squashes,
                bypasses=stats.bypasses,
                programs=stats.programs,
                compiles_after_warm_up=self._compiles.after_warm_up,
            ),
        )

    async def abort_requests(
        self, request: pb.AbortRequestsRequest, context: Call
    ) -> pb.AbortRequestsResponse:
        """End requests; those that are not in flight are passed over."""
        llm = self._llm()
        for request_id in request.request_ids:
            for name in self._outbox.requests_of(request_id):
                llm.engine.cancel(name)
        return pb.AbortRequestsResponse()


def _cache(stats: EngineStats, pinned_bytes: int) -> pb.CacheStats:
    return pb.CacheStats(
        capacity_bytes=stats.total_pages * stats.page_bytes,
        used_bytes=stats.adapter_pages * stats.page_bytes,
        pinned_bytes=pinned_bytes,
        idle_bytes=stats.free_pages * stats.page_bytes,
        hits=stats.hits,
        misses=stats.misses,
        loads=stats.loads,
        evictions=stats.evictions,
        load_failures=stats.load_failures,
        host_bytes=stats.host_bytes,
        host_hits=stats.host_hits,
        disk_reads=stats.disk_reads,
    )


def _queues(stats: EngineStats) -> list[pb.QueueStats]:
    queues, lower = [], 0.0
    for index, lane in enumerate(stats.lanes):
        queue = pb.QueueStats(
            index=index,
            wrs_min=lower,
            quota_tokens=lane.quota_tokens,
            used_tokens=lane.used_tokens,
            waiting=lane.waiting,
            running=lane.running,
        )
        if not math.isinf(lane.upper_wrs):
            queue.wrs_max = lower = lane.upper_wrs
        queues.append(queue)
    return queues
