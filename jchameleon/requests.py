"""The requests of one call of the front door, from its arguments to their ends."""

from collections.abc import Generator, Iterator, Sequence
from typing import Any

from jchameleon.errors import InvalidRequestError
from jchameleon.outputs import RequestDelta
from jchameleon.runtime.submission import Submission

Prompt = str | Sequence[int]


class RequestStream(Iterator[RequestDelta]):
    """Pieces of the outputs of one call, as they come."""

    def __init__(
        self,
        deltas: Generator[RequestDelta, None, None],
        submissions: Sequence[Submission],
    ) -> None:
        self._deltas = deltas
        self._submissions = submissions

    def __next__(self) -> RequestDelta:
        return next(self._deltas)

    def close(self) -> None:
        """Cancel what is left, also what never started; a second call does nothing."""
        self._deltas.close()
        for submission in self._submissions:
            submission.abandon()


def as_prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return a list of prompts; one string or one list of token ids is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise InvalidRequestError(
            f"prompts of type {type(prompts).__name__} must be a string, a list of "
            "strings or a list of lists of token ids"
        )
    if not prompts:
        return []
    if all(isinstance(item, int) and not isinstance(item, bool) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    for item in prompts:
        if isinstance(item, str):
            continue
        if not isinstance(item, Sequence) or isinstance(item, bytes):
            raise InvalidRequestError(
                f"prompt {item!r:.60} must be a string or a list of token ids"
            )
    return list(prompts)  # type: ignore[arg-type]


def per_prompt(field: str, value: Any, kinds: tuple[type, ...], count: int) -> list:
    """Return one value per prompt; a single value stands for all.

    Raises:
      InvalidRequestError: wrong type, or a list of another length than the prompts.
    """
    if isinstance(value, kinds):
        return [value] * count
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise InvalidRequestError(f"{field}={value!r:.60} must be {names} or a list")
    for item in value:
        if not isinstance(item, kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise InvalidRequestError(
                f"{field} has {item!r:.60}, which must be {names}"
            )
    if len(value) != count:
        raise InvalidRequestError(
            f"{field} has {len(value)} entries for {count} prompts"
        )
    return list(value)
