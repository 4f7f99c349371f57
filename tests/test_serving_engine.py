"""EngineService over loopback."""

import grpc
import pytest
from server_harness import greedy, neighbours, refusal, running_server

from jchameleon.serving.proto.jchameleon.v1 import engine_pb2
from jchameleon.serving.proto.jchameleon.v1 import inference_pb2 as inference

Code = grpc.StatusCode


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = str(tmp_path_factory.mktemp("adapters"))
    with running_server({"adapters": {"root": root, "dynamic": True}}) as server:
        yield server


def test_server_info_and_stats_say_what_is_so(server):
    info = server.unary(
        "EngineService",
        "GetServerInfo",
        engine_pb2.GetServerInfoRequest(),
        engine_pb2.GetServerInfoResponse,
    )
    assert (info.model, info.max_model_len, info.max_running) == ("tiny", 512, 8)
    assert (info.backend, info.dtype, info.vocab_size) == ("cpu", "float32", 259)
    assert list(info.lora_targets) == ["q", "k", "v", "o"]
    assert info.dynamic_adapters and info.has_tokenizer and info.pool_bytes > 0
    assert info.policy == "chameleon-nosched"
    stats = server.unary(
        "EngineService",
        "GetStats",
        engine_pb2.GetStatsRequest(),
        engine_pb2.GetStatsResponse,
    )
    assert stats.engine.programs == 18
    assert stats.cache.capacity_bytes >= stats.cache.idle_bytes > 0


def test_abort_ends_requests_with_what_they_have(server):
    def abort(*ids):
        server.unary(
            "EngineService",
            "AbortRequests",
            engine_pb2.AbortRequestsRequest(request_ids=ids),
            engine_pb2.AbortRequestsResponse,
        )

    with neighbours(server):
        request = greedy("hello", 400, request_id="mine")
        request.sampling.temperature, request.sampling.n = 1, 2
        stream = server.stream(request)
        pieces = [next(stream)]
        abort("nobody", "mine")
        error = refusal(lambda: pieces.extend(stream))
        assert error.code() is Code.CANCELLED
        finishes = [o.finish for p in pieces for o in p.outputs if o.HasField("finish")]
        assert {f.reason for f in finishes} == {inference.FINISH_REASON_ABORTED}
    abort("mine")
