"""What a request changes in its logits before a token is drawn.

Biases, penalties and bans: the host keeps one entry for each token id that they touch
and updates it as tokens are drawn; a step sends the entries of all its rows as flat
lists of a fixed width, as many times as it takes, so no step builds or sends an array
of the vocabulary's size.
"""

from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jchameleon.sampling import SamplingParams

_LARGEST = float(np.finfo(np.float32).max)


class RowEdits:
    """The entries of one request; each token id has one at most."""

    def __init__(
        self,
        sampling: SamplingParams,
        prompt: np.ndarray,  # i32[n]
        *,
        end_token_ids: Iterable[int],
    ) -> None:
        """Count a prompt.

        Args:
          end_token_ids: not to be drawn before `min_tokens` are there.
        """
        self._factor = sampling.repetition_penalty
        self._presence = sampling.presence_penalty
        self._frequency = sampling.frequency_penalty
        self._penalises = sampling.penalises
        self._biased = bool(sampling.biases)
        self._banned_for = sampling.min_tokens
        banned = sorted(end_token_ids) if sampling.min_tokens else []
        seen = np.unique(prompt).tolist() if self._factor != 1.0 else []
        ids = list(dict.fromkeys([*seen, *banned, *(i for i, _ in sampling.biases)]))
        self._slots = {token_id: slot for slot, token_id in enumerate(ids)}
        self._ids = np.array(ids, np.int32)
        self._counts = [0] * len(ids)
        # Rows: added first; divisor or factor of the sum; taken off last.
        self._changes = np.zeros((3, len(ids)), np.float32)
        self._changes[1] = 1.0
        self._changes[1, : len(seen)] = self._factor
        for token_id, bias in sampling.biases:
            self._changes[0, self._slots[token_id]] = bias
        self._banned = [self._slots[token_id] for token_id in banned]
        self._changes[2, self._banned] = np.inf
        self._used = len(ids)

    @property
    def over(self) -> bool:
        """Whether no logit is changed from now on."""
        return not (self._penalises or self._biased or self._banned_for)

    @property
    def ids(self) -> np.ndarray:
        """Token id of each entry, i32[n]."""
        return self._ids[: self._used]

    @property
    def changes(self) -> np.ndarray:
        """f32[3, n]: bias, repetition factor, and what is subtracted; see `edit`."""
        return self._changes[:, : self._used]

    def add(self, token: int) -> None:
        """Count a drawn token."""
        if self._banned_for:
            self._banned_for -= 1
            if not self._banned_for:
                self._changes[2, self._banned] = 0.0  # none of them was drawn yet
        if not self._penalises:
            return
        slot = self._slots.setdefault(token, self._used)
        if slot == self._used:
            self._append(token)
        self._counts[slot] += 1
        self._changes[1, slot] = self._factor
        self._changes[2, slot] = self._presence + self._frequency * self._counts[slot]

    def _append(self, token: int) -> None:
        if self._used == len(self._ids):
            room = max(64, self._used)
            self._ids = np.pad(self._ids, (0, room))
            self._changes = np.pad(self._changes, ((0, 0), (0, room)))
        self._ids[self._used] = token
        self._changes[:, self._used] = 0.0
        self._counts.append(0)
        self._used += 1


def edits_width(num_rows: int) -> int:
    """Return the entries of one call of `edit` on logits of this many rows."""
    return max(1024, 256 * num_rows)


def edit_lists(
    edits: Sequence[tuple[int, RowEdits]], *, width: int, vocab_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield what `edit` takes, as often as needed for (row, its edits)."""
    places = np.concatenate(
        [np.stack([one.ids, np.full_like(one.ids, row)]) for row, one in edits], axis=1
    )
    changes = np.concatenate([one.changes for _, one in edits], axis=1)
    for start in range(0, places.shape[1], width):
        part = places[:, start : start + width]
        # Padding lies outside the vocabulary, where nothing is read or written.
        place = np.full((2, width), vocab_size, np.int32)
        place[:, : part.shape[1]] = part
        change = np.zeros((3, width), np.float32)
        change[:, : part.shape[1]] = changes[:, start : start + width]
        yield place, change


def edit(
    logits: jax.Array,  # f32[V, R]
    places: jax.Array,  # i32[2, E]: token id, row; no place twice
    changes: jax.Array,  # f32[3, E]: bias, repetition factor, what is subtracted
) -> jax.Array:  # f32[V, R]
    """Return the logits with some entries changed.

    Order of operations as in vLLM: the bias; then the repetition penalty, which divides
    positive logits and multiplies others (Keskar et al. 2019, CTRL, as transformers
    has it); then presence and frequency penalties. An infinite subtrahend bans a token:
    it becomes the least finite number. Logits that are not finite become NaN, to be
    found by the sampler.
    """
    ids, rows = places
    bias, factor, less = changes
    old = logits.at[ids, rows].get(mode="fill", fill_value=0.0)
    new = old + bias
    new = jnp.where(new > 0, new / factor, new * factor)
    new = jnp.clip(new - less, -_LARGEST, _LARGEST)
    new = jnp.where(jnp.isfinite(old), new, jnp.nan)
    return logits.at[ids, rows].set(new, mode="drop")
