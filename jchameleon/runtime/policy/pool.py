"""Who owns which device page: the books of the one pool, in plain integers."""

from collections.abc import Hashable

from jchameleon.config import RESERVED_PAGES
from jchameleon.errors import JChameleonError


class PoolExhausted(JChameleonError, RuntimeError):
    """Fewer pages are free than were asked for; nothing was changed."""


class PagePool:
    """Hand out pages 2 .. num_pages - 1 to owners, each page to one owner at a time.

    One owner, the prefix cache, holds pages one by one: `shelve` and `unshelve`.

    Raises:
      ValueError: the pool has no page beside the two reserved ones.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages <= RESERVED_PAGES:
            raise ValueError(f"num_pages={num_pages} must be above {RESERVED_PAGES}")
        self.num_pages = num_pages
        # A stack with the lowest page on top: what was freed last is reused first.
        self._free = list(range(num_pages - 1, RESERVED_PAGES - 1, -1))
        self._owned: dict[Hashable, tuple[int, ...]] = {}
        self._shelved: set[int] = set()

    @property
    def free_pages(self) -> int:
        """Pages that nobody owns, without the two reserved ones."""
        return len(self._free)

    @property
    def shelved_pages(self) -> int:
        """Pages of the prefix cache."""
        return len(self._shelved)

    def reserve(self, owner: Hashable, count: int) -> tuple[int, ...]:
        """Give `count` >= 1 free pages to a new owner and return them in order.

        Raises:
          PoolExhausted: fewer than `count` pages are free.
          ValueError: `count` < 1, or `owner` owns pages already.
        """
        if owner in self._owned:
            raise ValueError(f"owner={owner!r} owns pages already")
        pages = self._take(owner, count)
        self._owned[owner] = pages
        return pages

    def extend(self, owner: Hashable, count: int) -> tuple[int, ...]:
        """Give `count` >= 1 more free pages to an owner and return those.

        Raises:
          PoolExhausted: fewer than `count` pages are free.
          ValueError: `count` < 1.
          KeyError: `owner` owns nothing.
        """
        held = self._owned[owner]
        pages = self._take(owner, count)
        self._owned[owner] = held + pages
        return pages

    def commit(self, owner: Hashable, new_owner: Hashable) -> None:
        """Hand all pages of `owner` to `new_owner`, in the same order.

        Raises:
          KeyError: `owner` owns nothing.
          ValueError: `new_owner` owns pages already.
        """
        if new_owner in self._owned:
            raise ValueError(f"new_owner={new_owner!r} owns pages already")
        self._owned[new_owner] = self._owned.pop(owner)

    def free(self, owner: Hashable) -> int:
        """Take back all pages of `owner` and return how many there were.

        Raises:
          KeyError: `owner` owns nothing.
        """
        pages = self._owned.pop(owner)
        self._free.extend(reversed(pages))
        return len(pages)

    def trim(self, owner: Hashable, count: int) -> None:
        """Take back the first `count` pages of an owner, which may end up with none.

        Raises:
          KeyError: `owner` owns nothing.
          ValueError: it owns fewer pages.
        """
        self._free.extend(reversed(self._split(owner, count)))

    def shelve(self, owner: Hashable, count: int) -> tuple[int, ...]:
        """Hand the first `count` pages of an owner to the prefix cache; return them.

        Raises:
          KeyError: `owner` owns nothing.
          ValueError: it owns fewer pages.
        """
        pages = self._split(owner, count)
        self._shelved.update(pages)
        return pages

    def unshelve(self, page: int) -> None:
        """Take back one page of the prefix cache.

        Raises:
          KeyError: the cache does not hold it.
        """
        self._shelved.remove(page)
        self._free.append(page)

    def pages_of(self, owner: Hashable) -> tuple[int, ...]:
        """Return the pages of `owner` in the order in which they were handed out.

        Raises:
          KeyError: `owner` owns nothing.
        """
        return self._owned[owner]

    def owners(self) -> tuple[Hashable, ...]:
        """Return everyone who owns pages, oldest first."""
        return tuple(self._owned)

    def check(self) -> None:
        """Assert that all free and owned pages are exactly 2 .. num_pages - 1."""
        pages = [p for owned in self._owned.values() for p in owned]
        pages += [*self._free, *self._shelved]
        assert sorted(pages) == list(range(RESERVED_PAGES, self.num_pages)), (
            "pages lost, doubled or reserved ones handed out"
        )

    def _split(self, owner: Hashable, count: int) -> tuple[int, ...]:
        """Take the first `count` pages from an owner and return them."""
        pages = self._owned[owner]
        if not 0 <= count <= len(pages):
            raise ValueError(
                f"{owner!r} owns {len(pages)} pages, {count=} must be among"
            )
        self._owned[owner] = pages[count:]
        return pages[:count]

    def _take(self, owner: Hashable, count: int) -> tuple[int, ...]:
        if count < 1:
            raise ValueError(f"count={count} of {owner!r} must be at least 1")
        if count > len(self._free):
            raise PoolExhausted(
                f"{owner!r} needs {count} pages, {len(self._free)} are free"
            )
        pages = tuple(reversed(self._free[-count:]))
        del self._free[-count:]
        return pages
