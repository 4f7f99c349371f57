"""An engine whose steps take their time, and what tests of adapters do with it."""

import contextlib
import threading
import time
from collections.abc import Iterator

from adapter_versions import GREEDY, PAGE_BYTES, SMALL
from slow_adapters import read_adapter

from jchameleon.errors import JChameleonError
from jchameleon.llm import LLM
from jchameleon.sampling import SamplingParams

PROMPT = [5, 6, 7, 8, 9]
LONG = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)
# Room for two adapters of rank 8 and four requests, or little more than one of rank 64.
OPTIONS = SMALL | {"pool_bytes": 48 * PAGE_BYTES}


@contextlib.contextmanager
def slow_engine(**options) -> Iterator[LLM]:
    """Yield an engine without adapters; it reads them by `read_adapter`.

    Long requests last, however late a test's thread gets its turn.
    """
    with LLM("tiny", **OPTIONS, **options) as llm:
        llm._host.read = read_adapter  # waits where a test closes a gate
        step = llm._engine._step

        def slow_step(*args):
            time.sleep(0.004)
            return step(*args)

        llm._engine._step = slow_step
        yield llm


def ask(llm, name, sampling=GREEDY):
    [output] = llm.generate([PROMPT], name, sampling)
    assert output.finish_reason == "length", output.error
    return output.token_ids


def tokens_of(stream):
    return tuple(token for delta in stream for token in delta.token_ids)


def info_of(llm, name):
    [info] = [i for i in llm.list_adapters() if i.name == name and not i.draining]
    return info


def in_thread(action):
    """Start a thread; `.result` is what it returned or raised, once it is joined."""

    class Thread(threading.Thread):
        result = None

        def run(self):
            try:
                self.result = action()
            except JChameleonError as error:
                self.result = error

        def finish(self):
            self.join(30)
            assert not self.is_alive(), "it waits for ever"
            return self.result

    thread = Thread()
    thread.start()
    return thread


def wait_until(condition):
    end_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.001)


def open_requests(llm, name="a"):
    return info_of(llm, name).requests
