"""`jchameleon bench serve` against a server on loopback."""

import json

import pytest
from server_harness import running_server

from jchameleon.cli import main


@pytest.fixture(scope="module")
def server():
    with running_server({}) as server:
        yield server


def bench(server, *options):
    return main(["bench", "serve", "--server", server.target, *map(str, options)])


def test_bench_prints_a_summary_and_writes_report_and_plot(server, tmp_path, capsys):
    report_path, plot_path = tmp_path / "report.json", tmp_path / "plot.svg"
    code = bench(
        server,
        *("--rate", 50, "--num-requests", 12, "--seed", 3),
        *("--input-len", "4:9", "--output-len", 5, "--adapters", "base"),
        *("--goodput", "ttft_ms:60000", "tpot_ms:60000", "--percentiles", 50, 99),
        *("--json", report_path, "--plot", plot_path, "--metadata", "run=first"),
    )
    out, err = capsys.readouterr()
    assert code == 0
    report = json.loads(report_path.read_text())
    assert report["completed"] == 12 and report["failed"] == 0
    assert report["output_lens"] == [5] * 12
    assert report["total_output_tokens"] == 60
    assert all(4 <= length <= 9 for length in report["input_lens"])
    assert report["request_goodput"] == report["request_throughput"]
    assert report["metadata"] == {"run": "first"}
    assert report["args"]["rate"] == 50.0 and report["seed"] == 3
    assert report["arrival_process"] == "poisson" and report["request_rate"] == 50.0
    assert report["rank_mix"] == {"base": 1.0}
    assert "p99_e2el_ms" in report and "p90_e2el_ms" not in report
    assert "12 completed, 0 failed" in out and "TTFT" in out
    assert "sent 12/12" in err and "done 12" in err
    assert plot_path.read_text().startswith("<svg")


def test_bench_replays_a_trace(server, tmp_path, capsys):
    trace, report_path = tmp_path / "trace.csv", tmp_path / "report.json"
    rows = "".join(f"{0.1 * i},{10 * (i + 1)},{i + 2}\n" for i in range(4))
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    code = bench(
        server,
        *("--trace", trace, "--arrivals", "trace", "--adapters", "base"),
        *("--input-len", "trace", "--output-len", "trace", "--num-requests", 4),
        *("--json", report_path),
    )
    assert code == 0
    report = json.loads(report_path.read_text())
    assert report["input_lens"] == [10, 20, 30, 40]
    assert report["output_lens"] == [2, 3, 4, 5]
    assert report["request_rate"] == pytest.approx(10.0)


def test_bench_with_failed_requests_says_why_and_ends_with_3(server, tmp_path, capsys):
    code = bench(
        server,
        *("--num-requests", 3, "--rate", "inf", "--adapters", "base"),
        *("--input-len", 4, "--output-len", 4, "--vocab-size", 1_000_000),
        *("--plot", tmp_path / "none.svg", "--json", tmp_path / "report.json"),
    )
    out, _ = capsys.readouterr()
    assert code == 3
    assert "0 completed, 3 failed" in out and "INVALID_ARGUMENT" in out
    assert not (tmp_path / "none.svg").exists()
    text = (tmp_path / "report.json").read_text()
    assert json.loads(text)["request_rate"] == "inf" and "Infinity" not in text


@pytest.mark.parametrize(
    "options, problem",
    [
        (("--rate", "0"), "rate_rps=0.0"),
        (("--goodput", "speed:1"), "goodput='speed:1'"),
        (("--percentiles", "101"), "percentiles="),
        (("--metadata", "x"), "metadata='x'"),
        (("--popularity", "pareto:1"), "popularity='pareto:1'"),
        (("--arrivals", "bursty:9:1:1"), "process='bursty:9:1:1' must be"),
        (("--input-len", "trace"), "need a trace"),
        (("--trace", "nowhere.csv"), "cannot read nowhere.csv"),
        (("--token-file", "nowhere"), "cannot read nowhere"),
    ],
)
def test_bench_refuses_nonsense_in_one_line(server, options, problem, capsys):
    assert bench(server, *options) == 2
    out, err = capsys.readouterr()
    assert not out and problem in err and err.count("\n") == 1


def test_bench_sends_in_clumps(server, tmp_path, capsys):
    report = tmp_path / "report.json"
    options = ["--arrivals", "gamma:3", "--rate", "50", "--num-requests", "8"]
    assert bench(server, *options, "--json", report) == 0
    assert json.loads(report.read_text())["arrival_process"] == "gamma:3"


def test_bench_without_a_server_says_so_in_one_line(capsys):
    assert main(["bench", "serve", "--server", "127.0.0.1:1"]) == 2
    _, err = capsys.readouterr()
    assert "UNAVAILABLE" in err and err.count("\n") == 1
