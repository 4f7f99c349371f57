"""Files below a folder, while links lead elsewhere."""

import os
import threading

import pytest

from jchameleon.errors import AdapterError
from jchameleon.lora.below import open_below


@pytest.fixture
def places(tmp_path):
    """A root with a folder `a`, and a folder outside; each with a file `f`."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "a").mkdir(parents=True)
    outside.mkdir()
    (root / "a/f").write_bytes(b"inside")
    (outside / "f").write_bytes(b"outside")
    return root, outside


def read(root, path):
    with open(open_below(root, path), "rb") as file:
        return file.read()


def test_open_below_reads_through_links_that_stay_inside(places):
    root, _ = places
    (root / "alias").symlink_to(root / "a")
    (root / "a/g").symlink_to("f")
    for path in ("a/f", "alias/f", "alias/g"):
        assert read(root, root / path) == b"inside"


@pytest.mark.parametrize(
    "path", ["../outside/f", "link/f", "file", "a/../../outside/f"]
)
def test_open_below_refuses_what_leads_out(places, path):
    root, outside = places
    (root / "link").symlink_to(outside)
    (root / "file").symlink_to(outside / "f")
    with pytest.raises(AdapterError, match="leads out of the adapter root"):
        open_below(root, root / path)


def test_open_below_leaves_no_descriptor_behind(places):
    root, _ = places
    before = len(os.listdir("/proc/self/fd"))
    read(root, root / "a/f")
    for path in ("a/nothing", "nothing/f", "a/f/g"):
        with pytest.raises(OSError):
            open_below(root, root / path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_open_below_is_not_fooled_by_a_link_that_takes_a_folders_place(places):
    root, outside = places
    (root / "spare").symlink_to(outside)
    done = threading.Event()

    def swap():
        while not done.is_set():
            for one, other in (("a", "spare"), ("spare", "a")):
                os.rename(root / one, root / "away")
                os.rename(root / other, root / one)
                os.rename(root / "away", root / other)

    swapping = threading.Thread(target=swap)
    swapping.start()
    seen = set()
    try:
        for _ in range(3000):
            try:
                seen.add(read(root, root / "a/f"))
            except (AdapterError, OSError) as error:
                seen.add(type(error))
    finally:
        done.set()
        swapping.join()
    assert b"outside" not in seen
    assert {b"inside", AdapterError} <= seen, "nothing was swapped"
