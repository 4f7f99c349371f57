"""tools/bench_server.py on the tiny model, whole."""

import pytest
from tool_runs import run_bench


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run_bench("bench_server", "--quick", folder=tmp_path_factory.mktemp("bench"))


def test_report_has_every_part(report):
    text, found = report
    assert set(found) == {
        "settings",
        "machine",
        "load_average",
        "calibration",
        "versions",
        "streams",
        "throughput",
        "checks",
    }
    assert [row["streams"] for row in found["streams"]] == found["settings"]["streams"]
    assert len(found["checks"]) == 5
    for check in found["checks"]:
        assert check in text
    assert "tiny, 2 adapters, 4 requests" in text


def test_all_roles_did_the_same_work(report):
    _, found = report
    for row in found["streams"]:
        for server, engine, echo in zip(
            row["runs"]["server"],
            row["runs"]["engine"],
            row["runs"]["echo"],
            strict=True,
        ):
            tokens = row["streams"] * found["settings"]["stream_tokens"]
            assert engine["output_tokens"] == tokens
            # A message holds a token or, where some waited for one another, several.
            assert row["streams"] <= server["num_messages"] <= tokens
            assert echo["num_messages"] <= tokens
            for sample in (server, engine, echo):
                assert len(sample["ttfts_s"]) == row["streams"]
                assert 0 < min(sample["ttfts_s"]) <= sample["wall_s"]
                assert 0 < sample["cpu"]["serving_s"] <= sample["cpu"]["process_s"]
        assert row["serving_ratio"]["median"] > 0
    assert found["throughput"]["ratio"]["median"] > 0
