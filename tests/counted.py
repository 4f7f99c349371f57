"""Work counted in calls, which no busy machine changes."""

import sys


def calls_of(action):
    """Return the Python calls that an action makes on this thread, and its result."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        result = action()
    finally:
        sys.setprofile(None)
    return count, result
