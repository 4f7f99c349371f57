"""`jchameleon` with an engine that fails on demand; run as a process of its own.

SIGUSR1 ends the engine's thread where it is. SIGUSR2 lets it hang, and go on again. An
adapter directory named "hangs" is on a disk that never answers.
"""

import signal
import sys
import threading

from jchameleon import llm
from jchameleon.cli import main
from jchameleon.runtime import engine

may_go_on = threading.Event()
may_go_on.set()
must_end = threading.Event()
iterate = engine.Engine._iterate
load = llm.load_peft_adapter


def faulty_iterate(self):
    may_go_on.wait()
    if must_end.is_set():
        raise SystemExit("the device is gone")
    iterate(self)


def faulty_load(path, *args, **options):
    if str(path).endswith("hangs"):
        threading.Event().wait()
    return load(path, *args, **options)


def toggle(*_):
    if may_go_on.is_set():
        may_go_on.clear()
    else:
        may_go_on.set()


if __name__ == "__main__":
    engine.Engine._iterate = faulty_iterate
    llm.load_peft_adapter = faulty_load
    signal.signal(signal.SIGUSR1, lambda *_: must_end.set())
    signal.signal(signal.SIGUSR2, toggle)
    sys.exit(main())
