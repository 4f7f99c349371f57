"""Run a server under random use and misuse, and watch that it stays as it was.

    python tools/soak_server.py --seconds 600 --json build/soak.json

A real second process serves the tiny model and more adapters than its pool holds.
Clients stream, cancel, miss deadlines, vanish, send nonsense and change adapters. Every
answer that comes must have the tokens that its adapter gave at the start, alone. At the
end nothing may be held: no rows, pages or claims; and memory, threads and file
descriptors must be where they were. Exit code 1 if something is not so.
"""

import argparse
import collections
import dataclasses
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from random_adapters import write_random_adapter

from jchameleon.client import CallError, Client, RetryPolicy
from jchameleon.config import ModelConfig

ADAPTERS = 8
TOKENS = 30
PAGE_BYTES = 8192  # of the tiny model: 2 layers of 2 x 2 heads x 16 tokens x 16 x f32
POOL_PAGES = 60
"""Room for three adapters or so beside the requests."""

START_S = 240.0
GREEDY = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True}
EXPECTED_CODES = {"RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "UNAVAILABLE", "CANCELLED"}

CONFIG = """\
model = "tiny"
[server]
port = 0
metrics_port = 0
[adapters]
root = "{root}"
dynamic = true
[limits]
max_waiting_requests = 12
[engine]
max_running = 8
max_batch_tokens = 64
max_model_len = 256
pool_bytes = {pool_bytes}
"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How large a server is, its front process included."""

    rss_bytes: int
    threads: int
    fds: int


def size_of(pid: int) -> Size:
    """Read the size of a process and of its children from /proc."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text("utf-8").split()
    sizes = [_own_size(one) for one in (pid, *map(int, children))]
    return Size(
        rss_bytes=sum(size.rss_bytes for size in sizes),
        threads=sum(size.threads for size in sizes),
        fds=sum(size.fds for size in sizes),
    )


def _own_size(pid: int) -> Size:
    status = Path(f"/proc/{pid}/status").read_text("utf-8")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return Size(
        rss_bytes=int(fields["VmRSS"].split()[0]) << 10,
        threads=int(fields["Threads"]),
        fds=len(list(Path(f"/proc/{pid}/fd").iterdir())),
    )


class Server:
    """`jchameleon serve` in a process of its own."""

    def __init__(self, folder: Path) -> None:
        """Start it and wait until it is ready."""
        root = folder / "adapters"
        for number in range(ADAPTERS):
            write_random_adapter(
                root / f"v{number}",
                ModelConfig.preset("tiny"),
                rank=8 * (1 + number % 3),
                targets=("q", "v"),
                seed=number,
            )
        path = folder / "serve.toml"
        config = CONFIG.format(root=root, pool_bytes=POOL_PAGES * PAGE_BYTES)
        path.write_text(config, "utf-8")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jchameleon", "serve", str(path)],
            stderr=subprocess.PIPE,
            text=True,
        )
        self._ready = threading.Event()
        self.port = 0
        threading.Thread(target=self._read, daemon=True).start()
        if not self._ready.wait(START_S) or not self.port:
            self.process.kill()
            raise RuntimeError(f"the server was not ready within {START_S:g} s")

    @property
    def target(self) -> str:
        """Its address."""
        return f"127.0.0.1:{self.port}"

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if not line.startswith("{"):
                print(line, end="", file=sys.stderr)
                continue
            event = json.loads(line)
            if event["event"] == "listening":
                self.port = event["port"]
            if event["event"] == "ready":
                self._ready.set()
            if event["level"] == "error":
                print(line, end="", file=sys.stderr)
        self._ready.set()

    def stop(self) -> int:
        """End it with SIGTERM; return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


class Soak:
    """Clients that use and misuse a server, and what they found."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.counts: collections.Counter[str] = collections.Counter()
        self.problems: list[str] = []
        self._ends_s = 0.0
        self._expected: dict[str | None, tuple[int, ...]] = {}

    def prepare(self) -> None:
        """Register all adapters and note what each answers, alone."""
        with self._client() as client:
            for number in range(ADAPTERS):
                client.register_adapter(f"a{number}", f"v{number}")
            for adapter in (None, *(f"a{number}" for number in range(ADAPTERS))):
                answer = client.generate("hello", adapter=adapter, **GREEDY)
                self._expected[adapter] = answer.token_ids
        assert len(set(self._expected.values())) == ADAPTERS + 1

    def run(self, seconds: float, clients: int, seed: int) -> list[Size]:
        """Let the clients loose; return the server's size, once a second."""
        self._ends_s = time.monotonic() + seconds
        threads = [
            threading.Thread(target=self._use, args=(seed * 1000 + number,))
            for number in range(clients)
        ]
        for thread in threads:
            thread.start()
        sizes = []
        while time.monotonic() < self._ends_s and self.server.process.poll() is None:
            sizes.append(size_of(self.server.process.pid))
            time.sleep(1.0)
        for thread in threads:
            thread.join(60)
            if thread.is_alive():
                self.problems.append("a client hangs")
        return sizes

    def check_idle(self, timeout_s: float = 30.0) -> None:
        """Note what is still held when nobody asks for anything."""
        end_s = time.monotonic() + timeout_s
        with self._client() as client:
            while True:
                stats = client.stats()
                held = {
                    "running": stats.engine.running,
                    "waiting": stats.engine.waiting,
                    "kv bytes": stats.kv.used_bytes,
                    "adapters' requests": sum(
                        one.running + one.waiting for one in client.list_adapters()
                    ),
                    "compiles": stats.engine.compiles_after_warm_up,
                }
                if not any(held.values()):
                    return
                if time.monotonic() > end_s:
                    self.problems.append(f"still held: {held}")
                    return
                time.sleep(0.05)

    def _client(self) -> Client:
        return Client(self.server.target, timeout_s=30.0, retry=RetryPolicy(attempts=1))

    def _use(self, seed: int) -> None:
        rng = random.Random(seed)
        actions: Sequence[tuple[int, Callable[[random.Random, Client], None]]] = (
            (30, self._whole),
            (30, self._cancel),
            (15, self._late),
            (10, self._vanish),
            (8, self._nonsense),
            (2, self._garbage),
            (5, self._administrate),
        )
        weights = [weight for weight, _ in actions]
        with self._client() as client:
            while time.monotonic() < self._ends_s:
                [(_, action)] = rng.choices(actions, weights)
                name = action.__name__.strip("_")
                try:
                    action(rng, client)
                    self.counts[name] += 1
                except CallError as error:
                    self.counts[f"{name}: {error.code.name}"] += 1
                    if error.code.name not in EXPECTED_CODES:
                        self.problems.append(f"{name}: {error}")
                except Exception as error:
                    self.problems.append(f"{name}: {type(error).__name__}: {error}")

    def _stream(
        self, rng: random.Random, client: Client, most: int, **options: Any
    ) -> int:
        """Read a stream up to `most` tokens, comparing; return how many came."""
        adapter = rng.choice([None, *(f"a{n}" for n in range(ADAPTERS))])
        ids: list[int] = []
        pieces = client.stream("hello", adapter=adapter, **GREEDY, **options)
        try:
            for piece in pieces:
                ids += piece.token_ids
                if len(ids) >= most:
                    break
        finally:
            pieces.close()  # type: ignore[attr-defined]
            if tuple(ids) != self._expected[adapter][: len(ids)]:
                self.problems.append(f"adapter {adapter}: tokens {ids}")
        return len(ids)

    def _whole(self, rng: random.Random, client: Client) -> None:
        if self._stream(rng, client, TOKENS + 1) != TOKENS:
            self.problems.append("a stream ended early without a status")

    def _cancel(self, rng: random.Random, client: Client) -> None:
        self._stream(rng, client, rng.randint(0, TOKENS))

    def _late(self, rng: random.Random, client: Client) -> None:
        self._stream(rng, client, TOKENS + 1, timeout_s=rng.uniform(0.001, 0.2))

    def _vanish(self, rng: random.Random, client: Client) -> None:
        """Close the connection under a stream."""
        with self._client() as other:
            pieces = other.stream("hello", adapter="a0", **GREEDY)
            next(pieces)

    def _nonsense(self, rng: random.Random, client: Client) -> None:
        code, fields = rng.choice(
            [
                ("NOT_FOUND", {"adapter": "nobody"}),
                ("INVALID_ARGUMENT", {"adapter": "../x"}),
                ("INVALID_ARGUMENT", {"max_tokens": 10_000}),
                ("INVALID_ARGUMENT", {"token_ids": [2**31]}),
            ]
        )
        prompt = None if "token_ids" in fields else "hello"
        try:
            client.generate(prompt, **fields)
        except CallError as error:
            if error.code.name == code:
                return
            raise
        self.problems.append(f"{fields} was answered")

    def _garbage(self, rng: random.Random, client: Client) -> None:
        try:
            with socket.create_connection(("127.0.0.1", self.server.port), 5) as one:
                one.sendall(rng.randbytes(rng.randint(1, 4096)))
        except OSError:
            pass  # it may close first

    def _administrate(self, rng: random.Random, client: Client) -> None:
        """Register contents again, and let an adapter of one's own come and go."""
        number = rng.randrange(ADAPTERS)
        client.register_adapter(f"a{number}", f"v{number}")
        name = f"own-{threading.get_ident()}"
        client.register_adapter(name, f"v{number}", replace=True)
        client.generate("hello", adapter=name, **GREEDY)
        client.unregister_adapter(name, force=rng.random() < 0.5)


def growth_problems(idle: Size, sizes: list[Size], after: Size) -> list[str]:
    """Return what has grown: in use between early and late, and at rest."""
    problems = []
    third = max(1, len(sizes) // 3)
    early = statistics.median(size.rss_bytes for size in sizes[third : 2 * third])
    late = statistics.median(size.rss_bytes for size in sizes[2 * third :])
    if late > 1.05 * early + (16 << 20):
        problems.append(f"memory grew from {early / 1e6:.0f} to {late / 1e6:.0f} MB")
    # Pools of threads fill up once; each client's connection is gone.
    if after.threads > idle.threads + 24:
        problems.append(f"threads grew from {idle.threads} to {after.threads}")
    if after.fds > idle.fds + 8:
        problems.append(f"file descriptors grew from {idle.fds} to {after.fds}")
    return problems


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if something was not as it must be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        server = Server(Path(folder))
        try:
            soak = Soak(server)
            soak.prepare()
            idle = size_of(server.process.pid)
            sizes = soak.run(options.seconds, options.clients, options.seed)
            soak.check_idle()
            time.sleep(1.0)  # connections end behind their clients
            after = size_of(server.process.pid)
            problems = [*soak.problems, *growth_problems(idle, sizes, after)]
            code = server.stop()
        finally:
            server.process.kill()
    if code:
        problems.append(f"the server ended with exit code {code}")
    figures = {
        "seconds": options.seconds,
        "idle": dataclasses.asdict(idle),
        "after": dataclasses.asdict(after),
        "most_rss_bytes": max(size.rss_bytes for size in sizes),
        "counts": dict(sorted(soak.counts.items())),
        "problems": problems[:50],
    }
    print(json.dumps(figures, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
