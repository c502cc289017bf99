"""attention: the row is laid out as defined, the mask is the definition, one packed forward is many separate ones."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed import block_mask, noisy_starts
from torch import Tensor

from dtrpo_ray.method.attention import (
    LEFT_OUT,
    ONE_BLOCK,
    PAD,
    PROMPT,
    PackedRow,
    Planes,
    dense_mask,
    pack_row,
    sparse_mask,
)
from dtrpo_ray.models.sdar import SDAR

B = 4
MASK = 22
MakeModel = Callable[..., SDAR]
PROMPT_LENS = [0, 1, B - 1, B, B + 1, 2 * B]
RESPONSE_LENS = [(1,), (B,), (2 * B + 1,), (B - 1, 2 * B), (3 * B, B + 2), (7, 7)]


class Token(NamedTuple):
    id: int
    position: int
    side: int
    stream: int


def text(length: int, start: int = 1) -> np.ndarray:
    return np.arange(start, start + length, dtype=np.int64)


def noisy_versions(response: np.ndarray, draws: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng([seed, len(response), draws])
    return [np.where(rng.random(len(response)) < 0.5, MASK, response) for _ in range(draws)]


def sides_of(lens: tuple[int, ...], draws: int) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    responses = [text(n, start=5 * (s + 1)) % 20 for s, n in enumerate(lens)]
    return [(r, noisy_versions(r, draws, seed=s)) for s, r in enumerate(responses)]


def defined_row(prompt: np.ndarray, sides: list[tuple[np.ndarray, list[np.ndarray]]]) -> list[Token]:
    """The row token by token: whole prompt blocks; per side the clean text before its last block, then each draw."""
    shared = max((p + 1 for p in range(len(prompt)) if (p + 1) % B == 0), default=0)
    row = [Token(int(prompt[p]), p, PROMPT, 0) for p in range(shared)]
    for side, (response, noisy) in enumerate(sides):
        whole = [*prompt, *response]
        last_block = (len(whole) - 1) // B
        row += [Token(int(whole[p]), p, side, 0) for p in range(shared, len(whole)) if p // B < last_block]
        for draw, version in enumerate(noisy):
            seen = [*prompt, *version]
            row += [Token(int(seen[p]), p, side, draw + 1) for p in range(shared, len(whole))]
    return row


def tokens(row: PackedRow) -> list[Token]:
    planes = (row.ids, row.position, row.side, row.stream)
    return [Token(*(int(v) for v in values)) for values in zip(*planes, strict=True)]


def mask_of(row: PackedRow, padding: int = 0) -> np.ndarray:
    planes = [
        torch.tensor([*plane.tolist(), *[fill] * padding])[None]
        for plane, fill in ((row.position, 0), (row.side, PAD), (row.stream, 0))
    ]
    return block_mask(*planes, B)[0, 0].numpy()


def sees(query: Token, key: Token) -> bool:
    """The definition: a query reads the text it continues, up to the end of its own block.

    That text is the prompt and the clean stream of its side, except that a noisy query reads its own block in its own
    stream.
    """
    block, own_noise = query.position // B, query.stream > 0 and query.position // B == key.position // B
    if key.side != PROMPT and key.side != query.side:
        return False
    if own_noise:
        return key.stream == query.stream and key.side == query.side
    return key.stream == 0 and key.position // B <= block


@pytest.mark.parametrize("draws", [1, 2, 3])
@pytest.mark.parametrize("lens", RESPONSE_LENS, ids=str)
@pytest.mark.parametrize("prompt_len", PROMPT_LENS)
def test_row_is_the_defined_row(prompt_len: int, lens: tuple[int, ...], draws: int) -> None:
    prompt, sides = text(prompt_len), sides_of(lens, draws)
    row = pack_row(prompt, sides, B)
    expected = defined_row(prompt, sides)
    assert tokens(row) == expected
    assert row.first_position == prompt_len // B * B
    starts = noisy_starts(row)
    for side in range(len(lens)):
        first = [next(i for i, t in enumerate(expected) if (t.side, t.stream) == (side, d + 1)) for d in range(draws)]
        assert starts[side] == first


def test_row_of_an_unaligned_pair_number_by_number() -> None:
    m = MASK
    chosen, rejected = np.array([11, 12, 13, 14, 15, 16, 17]), np.array([18, 19, 20])
    noisy = [np.array([m, 12, 13, m, 15, m, m])], [np.array([m, m, 20])]
    row = pack_row(text(5), list(zip((chosen, rejected), noisy, strict=True)), B)
    #             prompt      | clean 0       | noisy 0                        | noisy 1 (one block: no clean part)
    assert row.ids.tolist() == [1, 2, 3, 4, 5, 11, 12, 13, 5, m, 12, 13, m, 15, m, m, 5, m, m, 20]
    assert row.position.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7, 8, 9, 10, 11, 4, 5, 6, 7]
    assert row.side.tolist() == [PROMPT] * 4 + [0] * 12 + [1] * 4
    assert row.stream.tolist() == [0] * 8 + [1] * 8 + [1] * 4
    assert noisy_starts(row) == [[8], [16]]
    assert row.first_position == 4


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("lens", RESPONSE_LENS, ids=str)
@pytest.mark.parametrize("prompt_len", PROMPT_LENS)
def test_mask_is_the_definition(prompt_len: int, lens: tuple[int, ...], draws: int) -> None:
    row = pack_row(text(prompt_len), sides_of(lens, draws), B)
    everyone = tokens(row)
    expected = [[sees(query, key) for key in everyone] for query in everyone]
    assert mask_of(row).tolist() == expected


@given(
    prompt_len=st.integers(0, 11), lens=st.lists(st.integers(1, 11), min_size=1, max_size=2), draws=st.integers(1, 3)
)
def test_mask_is_the_definition_for_any_lengths(prompt_len: int, lens: list[int], draws: int) -> None:
    everyone = tokens(row := pack_row(text(prompt_len), sides_of(tuple(lens), draws), B))
    assert mask_of(row).tolist() == [[sees(query, key) for key in everyone] for query in everyone]


def test_padding_sees_itself_alone_and_nobody_sees_padding() -> None:
    row = pack_row(text(5), sides_of((7, 3), 1), B)
    bare, padded = mask_of(row), mask_of(row, padding=6)
    n = len(row.ids)
    assert (padded[:n, :n] == bare).all()
    assert not padded[:n, n:].any()
    assert (padded[n:] == np.eye(n + 6, dtype=bool)[n:]).all()


def rows_of(picture: str) -> np.ndarray:
    return np.array([[c == "1" for c in line] for line in picture.split()])


def test_published_two_stream_mask() -> None:
    """The 2n x 2n mask of BD3-LM and SDAR, [noisy | clean] with n = 4 and blocks of 2.

    Ours is the same matrix in the order [clean | noisy], without the clean last block, which nobody but itself sees.
    """
    published = rows_of("11...... 11...... ..1111.. ..1111.. ....11.. ....11.. ....1111 ....1111")
    assert published.sum() == 24
    row = pack_row(text(0), [(text(4), noisy_versions(text(4), 1))], 2)
    kept = [4, 5, 0, 1, 2, 3]
    ours = block_mask(*(torch.from_numpy(v)[None] for v in (row.position, row.side, row.stream)), 2)[0, 0].numpy()
    assert ours.tolist() == published[np.ix_(kept, kept)].tolist()


def test_published_compact_mask() -> None:
    """[prompt 3 | clean 4 | noisy 4] in blocks of 2 counted from the response, backwards into the prompt.

    On our global grid that is a prompt of 4 whose first token is left out; and the clean last block does not exist.
    """
    published = rows_of(
        "1.......... 111........ 111........ 11111...... 11111...... 1111111.... 1111111.... "
        "111....11.. 111....11.. 11111....11 11111....11"
    )
    row = pack_row(text(4), [(text(4), noisy_versions(text(4), 1))], 2)
    ours = block_mask(*(torch.from_numpy(v)[None] for v in (row.position, row.side, row.stream)), 2)[0, 0].numpy()
    kept = [0, 1, 2, 3, 4, 7, 8, 9, 10]
    assert ours[1:, 1:].tolist() == published[np.ix_(kept, kept)].tolist()


# --- the mask in a model: float64 throughout, so that equal means equal to rounding ---


@pytest.fixture(scope="module")
def exact(make_model: MakeModel) -> SDAR:
    return make_model(seed=3, exact=True)


def packed_hidden(model: SDAR, row: PackedRow, padding: int = 0) -> Tensor:
    fills = ((row.ids, 0), (row.position, 0), (row.side, PAD), (row.stream, 0))
    ids, position, side, stream = (torch.tensor([*p.tolist(), *[fill] * padding])[None] for p, fill in fills)
    return model.hidden(ids, position, block_mask(position, side, stream, B))[0]


def separate_hidden(model: SDAR, ids: list[int]) -> Tensor:
    """A plain block-causal forward over one finished prefix and one block in progress."""
    block = torch.arange(len(ids)) // B
    mask = (block[None, :] <= block[:, None])[None, None]
    return model.hidden(torch.tensor([ids]), torch.arange(len(ids))[None], mask)[0]


@pytest.mark.parametrize("prompt_len", PROMPT_LENS)
def test_one_packed_forward_is_one_forward_per_block(exact: SDAR, prompt_len: int) -> None:
    """Same hidden states and same parameter gradients, for every block of both sides and both draws, to 1e-10."""
    prompt, sides = text(prompt_len), sides_of((10, 7), draws=2)
    row = pack_row(prompt, sides, B)
    packed = packed_hidden(exact, row)
    probe = torch.randn(packed.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noisy = torch.from_numpy(row.stream > 0)
    packed_grads = torch.autograd.grad((packed * probe)[noisy].sum(), list(exact.lm.model.parameters()))
    total = torch.zeros((), dtype=torch.float64)
    covered = 0
    for (response, versions), starts in zip(sides, noisy_starts(row), strict=True):
        end = prompt_len + len(response)
        for version, start in zip(versions, starts, strict=True):
            for first in range(row.first_position, end, B):
                last = min(first + B, end)
                clean, seen = [*prompt, *response], [*prompt, *version]
                alone = separate_hidden(exact, [*clean[:first], *seen[first:last]])[first:]
                at = slice(start + first - row.first_position, start + last - row.first_position)
                assert torch.allclose(packed[at], alone, rtol=0, atol=1e-10)
                total = total + (alone * probe[at]).sum()
                covered += last - first
    assert covered == int(noisy.sum())
    grads = torch.autograd.grad(total, list(exact.lm.model.parameters()))
    for one, many in zip(packed_grads, grads, strict=True):
        assert torch.allclose(one, many, rtol=1e-10, atol=1e-10)


def moved(before: Tensor, after: Tensor) -> set[int]:
    return set(torch.nonzero((before - after).abs().amax(-1) > 1e-9).flatten().tolist())


@torch.no_grad()
def test_a_noisy_token_moves_its_own_noisy_block_and_nothing_else(exact: SDAR) -> None:
    row = pack_row(text(5), sides_of((10, 7), draws=2), B)
    before = packed_hidden(exact, row)
    everyone = tokens(row)
    for at in np.flatnonzero(row.stream > 0).tolist():
        touched = everyone[at]
        row.ids[at] = (row.ids[at] + 1) % 20
        own = {
            i
            for i, t in enumerate(everyone)
            if (t.side, t.stream, t.position // B) == (touched.side, touched.stream, touched.position // B)
        }
        assert moved(before, packed_hidden(exact, row)) == own
        row.ids[at] = touched.id


@torch.no_grad()
def test_a_clean_token_moves_later_blocks_of_its_side_only(exact: SDAR) -> None:
    row = pack_row(text(5), sides_of((10, 7), draws=1), B)
    before = packed_hidden(exact, row)
    everyone = tokens(row)
    for at in np.flatnonzero((row.stream == 0) & (row.side >= 0)).tolist():
        touched = everyone[at]
        row.ids[at] = (row.ids[at] + 1) % 20
        block = touched.position // B
        readers = {
            i
            for i, t in enumerate(everyone)
            if t.side == touched.side and (t.position // B > block or (t.position // B == block and t.stream == 0))
        }
        assert moved(before, packed_hidden(exact, row)) == readers
        row.ids[at] = touched.id


@torch.no_grad()
def test_the_rejected_side_does_not_reach_the_chosen_side(exact: SDAR) -> None:
    row = pack_row(text(6), sides_of((10, 7), draws=1), B)
    before = packed_hidden(exact, row)
    rejected = row.side == 1
    row.ids[rejected] = (row.ids[rejected] + 7) % 20
    assert moved(before, packed_hidden(exact, row)) == set(np.flatnonzero(rejected).tolist())


@torch.no_grad()
def test_padding_a_row_changes_nothing(exact: SDAR) -> None:
    row = pack_row(text(6), sides_of((10, 7), draws=1), B)
    bare, padded = packed_hidden(exact, row), packed_hidden(exact, row, padding=9)
    assert torch.allclose(bare, padded[: len(bare)], rtol=0, atol=1e-12)
    assert torch.isfinite(padded).all()


# --- other rows: blocks left out, blocks counted from the response, full attention, several pairs ---


def planes_of(rows: list[PackedRow]) -> Planes:
    """Rows one after the other in one, each a pair of its own, and two tokens of padding."""
    names = ("block", "side", "stream")
    joined = [np.concatenate([*(getattr(r, n) for r in rows), [PAD if n == "side" else 0] * 2]) for n in names]
    pair = np.concatenate([*(np.full(len(r.ids), i) for i, r in enumerate(rows)), [0, 0]])
    return Planes(*(torch.from_numpy(v)[None] for v in (*joined, pair)))


def test_pairs_of_a_row_do_not_see_each_other() -> None:
    rows = [pack_row(text(p), sides_of(lens, 2), B) for p, lens in ((5, (7, 3)), (0, (4, 9)), (8, (1, 1)))]
    whole = dense_mask(planes_of(rows))[0, 0].numpy()
    expected, first = np.zeros_like(whole), 0
    for row in rows:
        n = len(row.ids)
        expected[first : first + n, first : first + n] = mask_of(row)
        first += n
    expected[first:, first:] = np.eye(2, dtype=bool)
    assert (whole == expected).all()


@pytest.mark.parametrize("origin", ["global", "response"])
def test_the_sparse_mask_is_the_dense_mask(origin: str) -> None:
    """FlexAttention's tiles and its rule within them, over rows of unequal length with padding, entry by entry."""
    rows = [pack_row(text(p), sides_of(lens, 2), B, origin) for p, lens in ((61, (70, 33)), (3, (40, 90)))]  # type: ignore[arg-type]
    first, second = planes_of(rows), planes_of(rows[:1]).pad(planes_of(rows).side.shape[1])
    planes = Planes(*(torch.cat(pair) for pair in zip(first, second, strict=True)))
    sparse, dense = sparse_mask(planes), dense_mask(planes)
    length = planes.side.shape[1]
    rule = sparse.mask_mod
    grid = torch.arange(length)
    for r in range(2):
        entry = rule(torch.tensor(r), torch.tensor(0), grid[:, None], grid[None, :])
        assert torch.equal(entry, dense[r, 0])
    size = sparse.BLOCK_SIZE[0]
    tiles = -(-length // size)
    padded = torch.zeros(2, tiles * size, tiles * size, dtype=torch.bool)
    padded[:, :length, :length] = dense[:, 0]
    busy = padded.view(2, tiles, size, tiles, size).any(4).any(2)
    assert torch.equal(sparse.to_dense()[:, 0].bool(), busy)
    assert not busy.all()


def test_blocks_counted_from_the_response_number_by_number() -> None:
    m = MASK
    row = pack_row(text(5), [(np.array([11, 12, 13, 14, 15, 16]), [np.array([m, 12, 13, m, m, 16])])], B, "response")
    #             prompt: a short block and a whole one | clean          | noisy
    assert row.ids.tolist() == [1, 2, 3, 4, 5, 11, 12, 13, 14, m, 12, 13, m, m, 16]
    assert row.position.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7, 8, 9, 10]
    assert row.block.tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3]
    assert (row.first_position, noisy_starts(row)) == (5, [[9]])


def test_a_noisy_stream_may_leave_blocks_out() -> None:
    out = LEFT_OUT
    noisy = [np.array([out, out, out, MASK, 15, 16, 17]), np.array([MASK, 12, 13, out, out, out, out])]
    row = pack_row(text(5), [(np.array([11, 12, 13, 14, 15, 16, 17]), noisy)], B)
    #             prompt      | clean          | draw 1, second block | draw 2, first block and the prompt's tail
    assert row.ids.tolist() == [1, 2, 3, 4, 5, 11, 12, 13, MASK, 15, 16, 17, 5, MASK, 12, 13]
    assert row.position.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 4, 5, 6, 7]
    assert row.columns(0, np.array([1, 1]), np.array([8, 11])).tolist() == [8, 11]
    assert row.columns(0, np.array([2, 2, 2]), np.array([2, 4, 7])).tolist() == [2, 12, 15]
    assert row.columns(0, np.array([0, 0]), np.array([0, 7])).tolist() == [0, 7]
    with pytest.raises(AssertionError, match="does not hold"):
        row.columns(0, np.array([2]), np.array([8]))


def test_full_attention_rows_hold_whole_sequences_that_see_themselves() -> None:
    sides = sides_of((4, 3), draws=2)
    row = pack_row(text(3), sides, ONE_BLOCK)
    assert row.ids.tolist() == [v for _, draws in sides for d in draws for v in [1, 2, 3, *d]]
    assert noisy_starts(row) == [[0, 7], [14, 20]]
    segment = np.repeat([0, 1, 2, 3], [7, 7, 6, 6])
    planes = planes_of([row])
    assert (dense_mask(planes)[0, 0].numpy()[:26, :26] == (segment[:, None] == segment[None, :])).all()


@torch.no_grad()
def test_flex_attention_reads_the_sparse_mask_as_the_trunk_reads_the_dense_one(make_model: MakeModel) -> None:
    """The path of a GPU, uncompiled on this CPU, forward only: equal hidden states where there is no padding."""
    model = make_model(seed=3)
    row = pack_row(text(5), sides_of((10, 7), 2), B)
    planes = planes_of([row])
    ids, position = (torch.from_numpy(np.append(v, [0, 0]))[None] for v in (row.ids, row.position))
    dense = model.hidden(ids, position, dense_mask(planes))
    model.lm.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):
        sparse = model.hidden(ids, position, sparse_mask(planes))  # type: ignore[arg-type]
    assert torch.allclose(dense, sparse, rtol=0, atol=1e-5)
