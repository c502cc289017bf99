"""Keys and values of finished blocks in pages, one block a page, shared by requests with a common prefix.

Block-causal attention makes sharing exact: a block's keys depend on the blocks up to it and on nothing later, so a page
is right for every request with the same ids up to its end. `PagePool` assigns pages, `PagedKeys` holds the tensors.
Legend: P pages, B tokens of a block, R rows of a pass, T tokens of a row, H heads, D head size.
"""

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from itertools import takewhile

from torch import Tensor

SCRATCH = 0  # the page that padding is written to; nothing reads it


def block_digests(ids: Sequence[int], block_size: int) -> list[bytes]:
    """Return a digest of each whole block of `ids` together with everything before it."""
    digests: list[bytes] = []
    for start in range(0, len(ids) - block_size + 1, block_size):
        text = ",".join(map(str, ids[start : start + block_size]))
        digests.append(blake2b(b"".join(digests[-1:]) + text.encode(), digest_size=16).digest())
    return digests


class PagePool:
    """A bounded number of pages: their holders, and the blocks that they contain.

    A page is held by one or more requests or idle: held by none. The content of an idle page is kept until the page is
    needed; those without content are taken first.
    """

    def __init__(self, num_pages: int) -> None:
        self.holders = [0] * num_pages
        self.idle = OrderedDict.fromkeys(range(SCRATCH + 1, num_pages))  # in the order in which they are taken
        self.page_of: dict[bytes, int] = {}
        self.digest_of: dict[int, bytes] = {}

    def cached_prefix(self, digests: Sequence[bytes]) -> list[int]:
        """Return the pages of the longest prefix of blocks that is cached."""
        return [self.page_of[digest] for digest in takewhile(self.page_of.__contains__, digests)]

    def acquire(self, shared: Sequence[int], count: int) -> list[int] | None:
        """Hold the pages `shared` and `count` fresh ones, and return these; None if too few are idle."""
        if count > len(self.idle) - sum(page in self.idle for page in shared):
            return None
        for page in shared:
            self.idle.pop(page, None)
            self.holders[page] += 1
        fresh = [self.idle.popitem(last=False)[0] for _ in range(count)]
        for page in fresh:
            self.retract(page)
            self.holders[page] = 1
        return fresh

    def publish(self, page: int, digest: bytes) -> bool:
        """Announce that a held page contains, or will contain, the block of `digest`; False if another already does."""
        if digest in self.page_of or page in self.digest_of:
            return False
        self.page_of[digest], self.digest_of[page] = page, digest
        return True

    def retract(self, page: int) -> None:
        """Forget what a page contains, or was to contain."""
        if page in self.digest_of:
            del self.page_of[self.digest_of.pop(page)]

    def release(self, pages: Sequence[int]) -> None:
        """Drop one holder of each page."""
        for page in reversed(pages):  # so that the last blocks of a prefix are evicted first
            self.holders[page] -= 1
            if not self.holders[page]:
                self.idle[page] = None
                self.idle.move_to_end(page, last=page in self.digest_of)


class PagedKeys:
    """Keys and values [P, B, H, D] per layer, with the interface of transformers' caches.

    Before a pass, `aim` sets where its tokens are written and what its rows read. Denoising passes over a block
    overwrite each other, and the pass over the finished block leaves the final values: committing needs no copy.
    """

    def __init__(self, num_pages: int, block_size: int) -> None:
        self.num_pages, self.block_size = num_pages, block_size
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.slots: Tensor
        self.table: Tensor

    def aim(self, slots: Tensor, table: Tensor) -> None:
        """Set `slots` [R * T], page * B + offset of each token, and `table` [R, n], the pages of each row in order."""
        self.slots, self.table = slots, table

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Store [R, H, T, D] and return what the rows read, [R, H, n * B, D]; the trunk's attention calls this."""
        if layer not in self.layers:
            shape = (self.num_pages, self.block_size, key.shape[1])
            self.layers[layer] = (key.new_zeros((*shape, key.shape[3])), value.new_zeros((*shape, value.shape[3])))
        return self._store(self.layers[layer][0], key), self._store(self.layers[layer][1], value)

    def _store(self, pages: Tensor, new: Tensor) -> Tensor:
        heads, size = new.shape[1], new.shape[3]
        pages.view(-1, heads, size).index_copy_(0, self.slots, new.transpose(1, 2).reshape(-1, heads, size))
        rows, count = self.table.shape
        read = pages.view(self.num_pages, -1).index_select(0, self.table.reshape(-1))
        return read.view(rows, count * self.block_size, heads, size).transpose(1, 2)

    def get_seq_length(self, *_: object) -> int:
        """Return 0: the trunk asks for it to number positions, and ours are explicit."""
        return 0
