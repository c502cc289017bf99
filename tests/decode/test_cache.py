"""cache: pages are counted, shared and forgotten in order, and never more than there are."""

from hypothesis import given
from hypothesis import strategies as st

from dtrpo_ray.decode.cache import PagePool, block_digests


def test_a_digest_is_of_the_block_and_all_before_it() -> None:
    base = block_digests([1, 2, 3, 4, 5], 2)
    assert len(base) == 2
    assert block_digests([1, 2, 3, 4], 2) == base
    assert block_digests([1, 2, 9, 4], 2)[0] == base[0]
    assert block_digests([9, 2, 3, 4], 2)[1] != base[1]
    assert block_digests([12, 3], 2) != block_digests([1, 23], 2)


def test_idle_content_is_found_until_room_is_needed() -> None:
    pool = PagePool(4)
    digests = block_digests(range(6), 2)
    pages = pool.acquire([], 3)
    assert pages is not None
    for page, digest in zip(pages, digests, strict=True):
        assert pool.publish(page, digest)
    pool.release(pages)
    assert pool.cached_prefix(digests) == pages
    assert pool.acquire(pages[:1], 3) is None  # three pages in all
    assert pool.acquire(pages[:1], 1) == [pages[2]]  # of one prefix the end is forgotten first
    assert pool.cached_prefix(digests) == pages[:2]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.booleans()), max_size=40))
def test_no_page_has_two_owners_and_none_is_lost(script: list[tuple[int, int, bool]]) -> None:
    pool, held = PagePool(8), []
    for prompt, count, leave in script:
        digests = block_digests([prompt] * count, 1)
        shared = pool.cached_prefix(digests)
        fresh = pool.acquire(shared, count - len(shared))
        if fresh is not None:
            for page, digest in zip(fresh, digests[len(shared) :], strict=True):
                pool.publish(page, digest)
            held.append([*shared, *fresh])
        if held and (leave or fresh is None):
            pool.release(held.pop(0))
        in_use = {page for pages in held for page in pages}
        assert not in_use & {*pool.idle}
        assert len(in_use) + len(pool.idle) == 7
        assert all(pool.holders[p] == sum(p in pages for pages in held) for p in range(8))
