"""trajectory: every law by enumeration. A scripted generator walks through all draws with their exact probabilities.

What an estimator adds up is kept formal: (hidden positions of the block, scored token) -> coefficient. Two estimators
with equal mean coefficients agree in expectation for any model whatever. The toy denoiser puts numbers in.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrpo_ray.method.trajectory import (
    GIVEN,
    NEVER,
    BlockGenerators,
    NumDraws,
    State,
    Weighting,
    block_generators,
    block_slices,
    dense_steps,
    ordered_steps,
    row_generator,
    sample_complementary_states,
    sample_elbo_states,
    sample_step_states,
    sequential_steps,
)

T = TypeVar("T")
Sampler = Callable[[np.random.Generator], State]
Formal = dict[tuple[frozenset[int], int], Fraction]
Values = Callable[[frozenset[int], int], float]


class Script:
    """A `Generator` that takes the branches of `path` and notes how many each choice had."""

    def __init__(self, path: Sequence[int]) -> None:
        self.path, self.widths = path, list[int]()

    def _branch(self, width: int) -> int:
        self.widths.append(width)
        return self.path[len(self.widths) - 1] if len(self.widths) <= len(self.path) else 0

    def __call__(self, block: int) -> "Script":
        """Every block draws from the one script."""
        return self

    def integers(self, low: int, high: int | None = None) -> int:
        low, high = (0, low) if high is None else (low, high)
        return low + self._branch(high - low)

    def choice(self, values: np.ndarray) -> int:
        return int(values[self._branch(len(values))])

    def permutation(self, n: int) -> np.ndarray:
        orders = list(itertools.permutations(range(n)))
        return np.array(orders[self._branch(len(orders))], dtype=np.int64)


def every_draw(sample: Callable[[np.random.Generator], T]) -> Iterator[tuple[Fraction, T]]:
    """All outcomes of a sampling function with their probabilities; these sum to 1."""
    path: list[int] | None = []
    while path is not None:
        rng = Script(path)
        outcome = sample(rng)  # type: ignore[arg-type]
        yield Fraction(1, math.prod(rng.widths)), outcome
        path = path + [0] * (len(rng.widths) - len(path))
        while path and path[-1] + 1 == rng.widths[len(path) - 1]:
            path.pop()
        path = [*path[:-1], path[-1] + 1] if path else None


def none_given(blocks: list[slice]) -> np.ndarray:
    return np.zeros(blocks[-1].stop, dtype=bool)


def random_steps(blocks: list[slice], k: int, rng: BlockGenerators, given: np.ndarray | None = None) -> np.ndarray:
    given = none_given(blocks) if given is None else given
    return ordered_steps(blocks, k, given, lambda block, free: rng(block).permutation(len(free)))


def confidence_steps(confidence: np.ndarray, blocks: list[slice], k: int, given: np.ndarray) -> np.ndarray:
    return ordered_steps(blocks, k, given, lambda _, free: -confidence[free])


def elbo_states(blocks: list[slice], rng: BlockGenerators, num_draws: int = 1) -> list[State]:
    return sample_elbo_states(blocks, rng, num_draws, none_given(blocks))


def coefficients(state: State, blocks: list[slice], kind: str = "weight") -> Formal:
    """What the estimator of one state adds up: the weight of each token in its block's hidden set."""
    out: Formal = {}
    weights = getattr(state, kind)
    for block in blocks:
        hidden = frozenset(i for i in range(block.start, block.stop) if state.hidden[i])
        for i in range(block.start, block.stop):
            if weights[i]:
                out[hidden, i] = Fraction(float(weights[i])).limit_denominator(1000)
    return out


def mean(sample: Sampler, blocks: list[slice], kind: str = "weight") -> Formal:
    total: Counter[tuple[frozenset[int], int]] = Counter()
    for probability, state in every_draw(sample):
        for key, weight in coefficients(state, blocks, kind).items():
            total[key] += probability * weight  # type: ignore[assignment]
    return dict(total)  # type: ignore[arg-type]


def full_sum(step_of: np.ndarray, blocks: list[slice]) -> Formal:
    """The whole trajectory: every step of every block once, its newly unmasked tokens with coefficient 1."""
    out: Formal = {}
    for block in blocks:
        positions = range(block.start, block.stop)
        for i in positions:
            if step_of[i] != NEVER:
                hidden = frozenset(j for j in positions if step_of[j] >= step_of[i] or step_of[j] == NEVER)
                out[hidden, i] = Fraction(1)
    return out


def evaluate(formal: Formal, values: Values) -> float:
    return sum(float(weight) * values(*key) for key, weight in formal.items())


def moments(sample: Sampler, blocks: list[slice], values: Values) -> tuple[float, float]:
    """Exact mean and variance of the estimator when (hidden, i) has the log-ratio `values(hidden, i)`."""
    draws = [(float(p), evaluate(coefficients(s, blocks), values)) for p, s in every_draw(sample)]
    assert sum(p for p, _ in draws) == pytest.approx(1)
    first = sum(p * x for p, x in draws)
    return first, sum(p * (x - first) ** 2 for p, x in draws)


def step_sampler(step_of: Sequence[int], blocks: list[slice], weighting: Weighting) -> Sampler:
    return lambda rng: sample_step_states(np.array(step_of), blocks, weighting, rng)[0]


# --- blocks, step_of, generators ---


@pytest.mark.parametrize(
    ("prompt_len", "response_len", "expected"),
    [
        (0, 8, [(0, 4), (4, 8)]),
        (1, 3, [(0, 3)]),
        (3, 6, [(0, 1), (1, 5), (5, 6)]),
        (4, 4, [(0, 4)]),
        (5, 7, [(0, 3), (3, 7)]),
        (8, 1, [(0, 1)]),
    ],
)
def test_blocks_lie_on_the_global_grid(prompt_len: int, response_len: int, expected: list[tuple[int, int]]) -> None:
    assert [(s.start, s.stop) for s in block_slices(prompt_len, response_len, 4)] == expected


@given(prompt_len=st.integers(0, 40), response_len=st.integers(1, 40), size=st.integers(1, 9))
def test_blocks_partition_the_response_by_global_position(prompt_len: int, response_len: int, size: int) -> None:
    blocks = block_slices(prompt_len, response_len, size)
    assert [i for s in blocks for i in range(s.start, s.stop)] == list(range(response_len))
    numbers = [{(prompt_len + i) // size for i in range(s.start, s.stop)} for s in blocks]
    first = prompt_len // size
    assert numbers == [{first + k} for k in range(len(blocks))]


@given(steps=st.lists(st.integers(-1, 5), min_size=1, max_size=12), base=st.integers(0, 90), gap=st.integers(1, 7))
def test_dense_steps_ignore_base_and_gaps(steps: list[int], base: int, gap: int) -> None:
    raw = np.array(steps)
    blocks = block_slices(3, len(raw), 4)
    step_of = dense_steps(raw, blocks)
    assert (dense_steps(np.where(raw == NEVER, NEVER, base + gap * raw), blocks) == step_of).all()
    assert ((step_of == NEVER) == (raw == NEVER)).all()
    for block in blocks:
        done = raw[block] != NEVER
        assert sorted(set(step_of[block][done].tolist())) == list(range(len(set(raw[block][done].tolist()))))
        order = np.sign(raw[block][done][:, None] - raw[block][done])
        assert (np.sign(step_of[block][done][:, None] - step_of[block][done]) == order).all()


def test_dense_steps_number_by_number() -> None:
    raw = np.array([7, 3, 3, 9, NEVER, 12, 5, 12])
    assert dense_steps(raw, [slice(0, 4), slice(4, 8)]).tolist() == [1, 0, 0, 2, NEVER, 1, 0, 1]


def test_row_generator_depends_on_its_four_arguments_alone() -> None:
    def draws(seed: int = 1, row: str = "pair-7", epoch: int = 2, tag: str = "chosen") -> list[int]:
        return row_generator(seed, row, epoch, tag).integers(0, 1000, 6).tolist()

    first = draws()
    np.random.seed(5)
    assert draws() == first
    others = [draws(seed=2), draws(row="pair-8"), draws(epoch=3), draws(tag="rejected")]
    assert all(other != first for other in others)
    # the numbers themselves: another hash, another process or another machine must not change them
    assert first == [528, 785, 718, 329, 179, 522]


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_random_steps_are_uniform_groups(k: int) -> None:
    """Each block's last group may be short; every assignment of positions to groups is equally likely."""
    blocks = block_slices(1, 7, 4)
    expected = [sorted(j // k for j in range(s.stop - s.start)) for s in blocks]
    seen: Counter[tuple[int, ...]] = Counter()
    for _, step_of in every_draw(lambda rng: random_steps(blocks, k, rng)):  # type: ignore[arg-type]
        assert [sorted(step_of[s].tolist()) for s in blocks] == expected
        seen[tuple(step_of.tolist())] += 1
    ways = [
        math.factorial(len(group)) // math.prod(math.factorial(n) for n in Counter(group).values())
        for group in expected
    ]
    assert len(seen) == math.prod(ways)
    assert len(set(seen.values())) == 1


# --- one sampled step per block ---

UNEQUAL = [0, 0, 0, 0, 2, 0, 1, 1]  # K = 1 and 3, sizes 4 and 1 + 2 + 1
EQUAL = [0, 1, 0, 1, 1, 1, 0, 1]  # K = 2 and 2, |I| uneven
PARTIAL = [NEVER, 0, 1, 1, NEVER, NEVER, NEVER, NEVER]  # a token, and a block, that no step unmasked
BLOCKS = [slice(0, 4), slice(4, 8)]


@pytest.mark.parametrize("weighting", ["steps", "tokens", "unit"])
@pytest.mark.parametrize("step_of", [UNEQUAL, EQUAL, PARTIAL], ids=["unequal", "equal", "partial"])
def test_state_hides_the_rest_and_scores_the_step(step_of: list[int], weighting: Weighting) -> None:
    for _, state in every_draw(step_sampler(step_of, BLOCKS, weighting)):
        for block in BLOCKS:
            own, hidden, scored, weight = (
                v[block] for v in (np.array(step_of), state.hidden, state.scored, state.weight)
            )
            steps = set(own[own != NEVER].tolist())
            if not steps:
                assert hidden.all()
                assert not scored.any()
                assert not weight.any()
                continue
            (t,) = set(own[scored].tolist())
            assert (scored == (own == t)).all()
            assert (hidden == ((own >= t) | (own == NEVER))).all()
            unmasked, newly = int((own != NEVER).sum()), int(scored.sum())
            expected = {"steps": len(steps), "tokens": unmasked / newly, "unit": 1}[weighting]
            assert weight.tolist() == [expected if s else 0 for s in scored]


@pytest.mark.parametrize("weighting", ["steps", "tokens"])
@pytest.mark.parametrize("step_of", [UNEQUAL, EQUAL, PARTIAL], ids=["unequal", "equal", "partial"])
def test_step_and_token_weights_are_unbiased_exactly(step_of: list[int], weighting: Weighting) -> None:
    assert mean(step_sampler(step_of, BLOCKS, weighting), BLOCKS) == full_sum(np.array(step_of), BLOCKS)


@given(raw=st.lists(st.integers(0, 3), min_size=1, max_size=7), prompt_len=st.integers(0, 3))
def test_unbiased_for_any_recorded_order(raw: list[int], prompt_len: int) -> None:
    blocks = block_slices(prompt_len, len(raw), 4)
    step_of = dense_steps(np.array(raw), blocks)
    for weighting in ("steps", "tokens"):
        assert mean(step_sampler(step_of.tolist(), blocks, weighting), blocks) == full_sum(step_of, blocks)


def test_unit_weight_divides_each_block_by_its_own_steps() -> None:
    """Weight 1 is the full sum with each block over K_b: one rescaling of beta if K is constant, a bias if not."""
    for step_of, num_steps in ((EQUAL, (2, 2)), (UNEQUAL, (1, 3))):
        biased = {(hidden, i): Fraction(1, num_steps[i // 4]) for hidden, i in full_sum(np.array(step_of), BLOCKS)}
        assert mean(step_sampler(step_of, BLOCKS, "unit"), BLOCKS) == biased


@pytest.mark.parametrize("step_of", [UNEQUAL, EQUAL, PARTIAL], ids=["unequal", "equal", "partial"])
def test_variance_is_the_formula(step_of: list[int]) -> None:
    """steps: sum_b K_b sum_t l_t^2 - (sum_t l_t)^2; tokens: sum_b B_b sum_t l_t^2 / |I_t| - (sum_t l_t)^2."""

    def value(hidden: frozenset[int], i: int) -> float:
        return math.sin(1 + 3 * i + sum(7 * j for j in hidden))

    steps_formula = tokens_formula = 0.0
    for block in BLOCKS:
        per_step: dict[int, list[float]] = {}
        for (hidden, i), _ in full_sum(np.array(step_of), [block]).items():
            per_step.setdefault(step_of[i], []).append(value(hidden, i))
        ell = [sum(v) for v in per_step.values()]
        tokens = sum(len(v) for v in per_step.values())
        steps_formula += len(ell) * sum(x * x for x in ell) - sum(ell) ** 2
        tokens_formula += tokens * sum(sum(v) ** 2 / len(v) for v in per_step.values()) - sum(ell) ** 2
    assert moments(step_sampler(step_of, BLOCKS, "steps"), BLOCKS, value)[1] == pytest.approx(steps_formula, abs=1e-12)
    assert moments(step_sampler(step_of, BLOCKS, "tokens"), BLOCKS, value)[1] == pytest.approx(
        tokens_formula, abs=1e-12
    )


TV1_MU = {0: (0.5, 0.25), 1: (0.9, 0.6), 2: (0.2, 0.4), 3: (0.8, 0.8)}  # token -> (mu_theta, mu_ref); 2 blocks of 2


def test_two_blocks_of_two_steps_number_by_number() -> None:
    blocks, step_of = [slice(0, 2), slice(2, 4)], [0, 1, 0, 1]

    def value(hidden: frozenset[int], i: int) -> float:
        return math.log(TV1_MU[i][0] / TV1_MU[i][1])

    def estimates(weighting: Weighting) -> list[float]:
        draws = every_draw(step_sampler(step_of, blocks, weighting))
        return [evaluate(coefficients(state, blocks), value) for _, state in draws]

    assert evaluate(full_sum(np.array(step_of), blocks), value) == pytest.approx(math.log(1.5))
    assert estimates("steps") == pytest.approx([0, 1.386294, -0.575364, 0.810930], abs=1e-6)
    assert estimates("unit") == pytest.approx([0, 0.693147, -0.287682, 0.405465], abs=1e-6)
    assert moments(step_sampler(step_of, blocks, "steps"), blocks, value) == pytest.approx(
        (0.405465, 0.563214), abs=1e-6
    )


def test_unequal_steps_number_by_number() -> None:
    """Block 1 in one step (ln 3), block 2 in two (-ln 2, 0): K_b is unbiased; weight 1, or a constant 2, is not."""
    blocks, step_of = [slice(0, 2), slice(2, 4)], [0, 0, 0, 1]
    ell = {0: math.log(3), 1: 0.0, 2: -math.log(2), 3: 0.0}
    value: Values = lambda hidden, i: ell[i]  # noqa: E731
    draws = [evaluate(coefficients(s, blocks), value) for _, s in every_draw(step_sampler(step_of, blocks, "steps"))]
    assert sorted(draws) == pytest.approx([-0.287682, 1.098612], abs=1e-6)
    assert np.mean(draws) == pytest.approx(0.405465, abs=1e-6)
    unit = moments(step_sampler(step_of, blocks, "unit"), blocks, value)[0]
    assert unit == pytest.approx(0.752039, abs=1e-6)
    assert 2 * unit == pytest.approx(1.504077, abs=1e-6)


def test_one_step_blocks_leave_nothing_to_chance() -> None:
    """K_b = 1: one draw, everything hidden and scored with weight 1; B = 1: the exact autoregressive sum."""
    for blocks in (BLOCKS, [slice(i, i + 1) for i in range(8)]):
        for weighting in ("steps", "tokens", "unit"):
            ((_, state),) = {repr(s): (p, s) for p, s in every_draw(step_sampler([0] * 8, blocks, weighting))}.values()
            assert state.hidden.all()
            assert state.scored.all()
            assert (state.weight == 1).all()


# --- the block ELBO, and what a random order has to do with it ---


def elbo(size: int, counts: Sequence[int]) -> Formal:
    """E over l in `counts` and l-subsets m of (size / l) sum_{i in m} (m, i), written out."""
    out: Formal = {}
    for count in counts:
        subsets = list(itertools.combinations(range(size), count))
        for subset in subsets:
            for i in subset:
                out[frozenset(subset), i] = Fraction(size, count) / len(subsets) / len(counts)
    return out


def any_order(size: int) -> Formal:
    """The mean over all orders of the one-token-at-a-time sum: each token scored when it is next."""
    out: Counter[tuple[frozenset[int], int]] = Counter()
    for order in itertools.permutations(range(size)):
        for t, i in enumerate(order):
            out[frozenset(order[t:]), i] += Fraction(1, math.factorial(size))  # type: ignore[assignment]
    return dict(out)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_elbo_state_averages_to_the_any_order_bound(size: int) -> None:
    block = [slice(0, size)]
    sampled = mean(lambda rng: elbo_states(block, rng)[0], block)
    assert sampled == elbo(size, range(1, size + 1)) == any_order(size)


def test_elbo_state_scores_what_it_hides_in_every_block() -> None:
    blocks = block_slices(2, 6, 4)
    for _, state in every_draw(lambda rng: elbo_states(blocks, rng)[0]):
        assert (state.scored == state.hidden).all()
        for block in blocks:
            count, size = int(state.hidden[block].sum()), block.stop - block.start
            assert 1 <= count <= size
            assert state.weight[block].tolist() == [size / count if h else 0 for h in state.hidden[block]]


def random_schedule(size: int, k: int, weighting: Weighting) -> Sampler:
    block = [slice(0, size)]
    return lambda rng: sample_step_states(random_steps(block, k, rng), block, weighting, rng)[0]


@pytest.mark.parametrize("weighting", ["steps", "tokens"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_random_order_dtrpo_is_the_block_elbo_in_expectation(k: int, weighting: Weighting) -> None:
    """The key identity: unmasking k at a time in a random order, |m| uniform on {k, 2k, .., B}, is an ELBO."""
    assert mean(random_schedule(4, k, weighting), [slice(0, 4)]) == elbo(4, range(k, 5, k))


@pytest.mark.parametrize("step_of", [UNEQUAL, EQUAL, PARTIAL], ids=["unequal", "equal", "partial"])
def test_coverage_weighs_every_hidden_token_of_the_state(step_of: list[int]) -> None:
    """B_b / |hidden in b| at each token still to come, so that a block's coverage adds up to its tokens."""
    for _, state in every_draw(step_sampler(step_of, BLOCKS, "steps")):
        for block in BLOCKS:
            to_come = state.hidden[block] & (np.array(step_of)[block] != NEVER)
            size = sum(r != NEVER for r in step_of[block])
            expected = [size / to_come.sum() if h else 0 for h in to_come]
            assert state.coverage[block].tolist() == pytest.approx(expected)
            assert state.coverage[block].sum() == pytest.approx(size)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_coverage_of_a_random_order_is_the_block_elbo(k: int) -> None:
    assert mean(random_schedule(4, k, "steps"), [slice(0, 4)], "coverage") == elbo(4, range(k, 5, k))


def test_coverage_of_an_elbo_state_is_its_weight() -> None:
    for _, state in every_draw(lambda rng: elbo_states(block_slices(1, 7, 4), rng)[0]):
        assert (state.coverage == state.weight).all()


# --- the toy denoiser: ids 0 = mask, 1 and 2; exact fractions ---

THETA, REF = (3, 5, 2, 1), (2, 3, 4, 1)


def mu(model: tuple[int, int, int, int], seen: Sequence[int], i: int, token: int) -> Fraction:
    a, b, d, e = model
    code = 0
    for v in seen:
        code = 3 * code + v
    weights = [1 + (a * code + b * i + d * u + e) % 7 for u in (1, 2)]
    return Fraction(weights[token - 1], sum(weights))


def log_ratio(final: Sequence[int]) -> Values:
    def value(hidden: frozenset[int], i: int) -> float:
        seen = [0 if j in hidden else v for j, v in enumerate(final)]
        return math.log(mu(THETA, seen, i, final[i]) / mu(REF, seen, i, final[i]))

    return value


@pytest.mark.parametrize(("k", "spread"), [(1, (6.886, 4.767)), (2, (1.837, 1.052)), (4, (0.0, 0.0))])
def test_the_elbo_form_has_the_lower_variance(k: int, spread: tuple[float, float]) -> None:
    """Same mean, less variance: scoring all hidden tokens averages over which of them come next (Rao-Blackwell)."""
    final, block = (1, 2, 2, 1), [slice(0, 4)]
    value = log_ratio(final)
    center, variance = moments(random_schedule(4, k, "steps"), block, value)
    subsets = [(m, n) for n in range(k, 5, k) for m in itertools.combinations(range(4), n)]
    draws = [(k / 4 / math.comb(4, n), 4 / n * sum(value(frozenset(m), i) for i in m)) for m, n in subsets]
    averaged = sum(p * x for p, x in draws)
    assert center == pytest.approx(averaged)
    assert variance == pytest.approx(spread[0], abs=1e-3)
    assert sum(p * (x - averaged) ** 2 for p, x in draws) == pytest.approx(spread[1], abs=1e-3)
    if k == 1:
        sampled = moments(lambda rng: elbo_states(block, rng)[0], block, value)
        assert sampled == pytest.approx((center, spread[1]), abs=1e-3)


Trajectory = tuple[tuple[int, ...], tuple[int, ...]]  # final tokens, and the step at which each was unmasked


def trajectories(model: tuple[int, int, int, int], alphas: Sequence[Fraction]) -> dict[Trajectory, Fraction]:
    """Every way to denoise two tokens under a schedule alpha_T = 0 .. alpha_0 = 1, with its probability.

    Built transition by transition: an unfinished token is unmasked with probability (alpha' - alpha) / (1 - alpha).
    """
    paths: dict[Trajectory, Fraction] = {((0, 0), (NEVER, NEVER)): Fraction(1)}
    for step, (before, after) in enumerate(itertools.pairwise(alphas)):
        rate = (after - before) / (1 - before)
        grown: Counter[Trajectory] = Counter()
        for (seen, when), probability in paths.items():
            choices = [[(v, w)] if v else [(0, NEVER), (1, step), (2, step)] for v, w in zip(seen, when, strict=True)]
            for choice in itertools.product(*choices):
                p = probability
                for i, (v, w) in enumerate(choice):
                    if not seen[i]:
                        p *= rate * mu(model, seen, i, v) if w == step else 1 - rate
                if p:
                    grown[tuple(v for v, _ in choice), tuple(w for _, w in choice)] += p  # type: ignore[assignment]
        paths = dict(grown)  # type: ignore[arg-type]
    return paths


SCHEDULES = {
    16: [Fraction(0), Fraction(1, 2), Fraction(1)],
    36: [Fraction(0), Fraction(1, 5), Fraction(9, 10), Fraction(1)],
}


def newly_unmasked_ratio(final: tuple[int, ...], steps: tuple[int, ...]) -> Fraction:
    """The product of mu_theta / mu_ref over every token in the state in which our sampler would score it."""
    block = [slice(0, len(final))]
    step_of = dense_steps(np.array(steps), block)
    ratios = []
    for hidden, i in mean(step_sampler(step_of.tolist(), block, "steps"), block):
        seen = [0 if j in hidden else v for j, v in enumerate(final)]
        ratios.append(mu(THETA, seen, i, final[i]) / mu(REF, seen, i, final[i]))
    return math.prod(ratios, start=Fraction(1))


@pytest.mark.parametrize("count", SCHEDULES)
def test_a_trajectorys_ratio_is_the_product_over_newly_unmasked_tokens(count: int) -> None:
    """Ratio Reduction, exactly: the schedule's coefficients cancel, those of empty steps too."""
    theta, ref = trajectories(THETA, SCHEDULES[count]), trajectories(REF, SCHEDULES[count])
    assert len(theta) == len(ref) == count
    assert sum(theta.values()) == sum(ref.values()) == 1
    for trajectory, probability in theta.items():
        assert probability / ref[trajectory] == newly_unmasked_ratio(*trajectory)
    assert sum(p * newly_unmasked_ratio(*trajectory) for trajectory, p in ref.items()) == 1


def test_the_marginal_ratio_is_the_mean_over_the_references_trajectories() -> None:
    """E over tau ~ pi_ref(.|y) of the product = pi_theta(y) / pi_ref(y); in logs it is a lower bound (Jensen)."""
    theta, ref = trajectories(THETA, SCHEDULES[36]), trajectories(REF, SCHEDULES[36])
    for final in itertools.product((1, 2), repeat=2):
        paths = [t for t in ref if t[0] == final]
        p_theta, p_ref = sum(theta[t] for t in paths), sum(ref[t] for t in paths)
        assert sum(ref[t] / p_ref * newly_unmasked_ratio(*t) for t in paths) == p_theta / p_ref
        in_logs = sum(float(ref[t] / p_ref) * math.log(newly_unmasked_ratio(*t)) for t in paths)
        assert in_logs <= math.log(p_theta / p_ref) + 1e-12


def test_toy_denoiser_is_the_tabulated_one() -> None:
    table = {
        ((0, 0), 0): ("2/5", "2/3"),
        ((0, 0), 1): ("1/3", "1/4"),
        ((0, 1), 0): ("7/9", "1/6"),
        ((0, 2), 0): ("3/8", "3/10"),
        ((1, 0), 1): ("2/5", "1/6"),
        ((2, 0), 1): ("6/7", "7/11"),
    }
    for (seen, i), values in table.items():
        assert (mu(THETA, seen, i, 1), mu(REF, seen, i, 1)) == tuple(map(Fraction, values))


def test_confidence_decoding_does_not_cancel() -> None:
    """Where the reduction ends: if the model's confidence chooses the position, the scheduler depends on theta.

    Top-1 of two sampled candidates. Position 1 shows "a": true ratio 3/10, ratio of newly unmasked tokens 1.
    """

    def probability(first: dict[str, Fraction], second: dict[str, Fraction]) -> Fraction:
        kept = [(a, b) for a in first for b in second if a == "a" and first[a] > second[b]]
        return sum((first[a] * second[b] for a, b in kept), Fraction(0))

    both = {"a": Fraction(3, 5), "b": Fraction(2, 5)}
    theta = probability(both, {"a": Fraction(7, 10), "b": Fraction(3, 10)})
    ref = probability(both, {"a": Fraction(11, 20), "b": Fraction(9, 20)})
    assert (theta, ref) == (Fraction(9, 50), Fraction(3, 5))
    assert theta / ref == Fraction(3, 10) != both["a"] / both["a"] == 1


# --- m draws a block ---


def total(states: list[State], blocks: list[slice], kind: str = "weight") -> Formal:
    """What all draws of one outcome add up to."""
    out: Counter[tuple[frozenset[int], int]] = Counter()
    for state in states:
        for key, weight in coefficients(state, blocks, kind).items():
            out[key] += weight  # type: ignore[assignment]
    return dict(out)  # type: ignore[arg-type]


def mean_of_draws(step_of: list[int], weighting: Weighting, num_draws: NumDraws, kind: str = "weight") -> Formal:
    out: Counter[tuple[frozenset[int], int]] = Counter()
    sample = lambda rng: sample_step_states(np.array(step_of), BLOCKS, weighting, rng, num_draws)  # noqa: E731
    for probability, states in every_draw(sample):
        for key, weight in total(states, BLOCKS, kind).items():
            out[key] += probability * weight  # type: ignore[assignment]
    return dict(out)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_draws", [1, 2, 3, 4, "all"])
@pytest.mark.parametrize("weighting", ["steps", "tokens"])
@pytest.mark.parametrize("step_of", [UNEQUAL, EQUAL, PARTIAL, [0, 1, 2, 3, 1, 0, 1, 2]], ids=str)
def test_m_strata_are_unbiased_exactly(step_of: list[int], weighting: Weighting, num_draws: NumDraws) -> None:
    assert mean_of_draws(step_of, weighting, num_draws) == full_sum(np.array(step_of), BLOCKS)


@pytest.mark.parametrize("weighting", ["steps", "tokens", "unit"])
def test_all_steps_are_the_exact_sum_in_one_outcome(weighting: Weighting) -> None:
    """No chance is left; a block of fewer steps than draws is exact too; unit divides each block by its K_b."""
    for num_draws in ("all", 3, 7):
        ((_, states),) = every_draw(
            lambda rng, m=num_draws: sample_step_states(np.array(UNEQUAL), BLOCKS, weighting, rng, m)
        )
        assert len(states) == 3
        scale = {0: Fraction(1), 1: Fraction(1)} if weighting != "unit" else {0: Fraction(1), 1: Fraction(1, 3)}
        expected = {key: scale[key[1] // 4] * value for key, value in full_sum(np.array(UNEQUAL), BLOCKS).items()}
        assert total(states, BLOCKS) == expected


def test_draws_of_a_block_are_different_steps_and_spread_over_it() -> None:
    """Four steps, two draws: one of the first two and one of the last two, each with weight 2."""
    step_of = np.array([0, 1, 2, 3])
    seen = set()
    for probability, (first, second) in every_draw(
        lambda rng: sample_step_states(step_of, [slice(0, 4)], "steps", rng, 2)
    ):
        assert probability == Fraction(1, 4)
        seen.add((int(step_of[first.scored][0]), int(step_of[second.scored][0])))
        assert first.weight.max() == second.weight.max() == 2
    assert seen == {(a, b) for a in (0, 1) for b in (2, 3)}


def test_variance_of_m_draws_is_the_sum_over_strata() -> None:
    """steps: sum over strata of n_s sum l_t^2 - (sum l_t)^2; it falls with m and is 0 at m = K."""
    ell = [0.3, -1.1, 0.7, 2.0, -0.4, 0.9]
    step_of, block = np.arange(6), [slice(0, 6)]
    found = []
    for m in (1, 2, 3, 6):
        draws = [
            (float(p), sum(float((s.weight * np.array(ell)).sum()) for s in states))
            for p, states in every_draw(lambda rng, m=m: sample_step_states(step_of, block, "steps", rng, m))
        ]
        center = sum(p * x for p, x in draws)
        assert center == pytest.approx(sum(ell))
        strata = [np.array(part) for part in np.array_split(ell, m)]
        formula = sum(len(s) * (s**2).sum() - s.sum() ** 2 for s in strata)
        found.append(sum(p * (x - center) ** 2 for p, x in draws))
        assert found[-1] == pytest.approx(formula, abs=1e-12)
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("weighting", ["steps", "tokens"])
@pytest.mark.parametrize("num_draws", [1, 2, "all"])
def test_shares_of_a_block_add_up_to_its_tokens(num_draws: NumDraws, weighting: Weighting) -> None:
    """The likelihood's weights too: whatever m is, a block's coverage adds up to its unmasked tokens."""
    for step_of in (UNEQUAL, EQUAL, PARTIAL):
        for _, states in every_draw(
            lambda rng, r=step_of: sample_step_states(np.array(r), BLOCKS, weighting, rng, num_draws)
        ):
            for block in BLOCKS:
                unmasked = sum(r != NEVER for r in step_of[block])
                assert sum(s.coverage[block].sum() for s in states) == pytest.approx(unmasked)


def test_given_tokens_are_shown_in_the_elbos_states_and_the_others_are_a_block_of_their_own() -> None:
    given = np.array([True, False, False, False, True, False])
    blocks = [slice(0, 3), slice(3, 4), slice(4, 6)]
    for n in (1, 3):
        for seed in range(20):
            states = sample_elbo_states(blocks, block_generators(seed, "row", 0, "state"), n, given)
            for block, free in zip(blocks, (2, 1, 1), strict=True):
                for values in ("weight", "coverage"):
                    assert sum(getattr(s, values)[block].sum() for s in states) == pytest.approx(free)
            assert not any((s.hidden | s.scored)[given].any() for s in states)


def test_elbo_draws_are_independent_and_share_the_weight() -> None:
    block = [slice(0, 2)]
    value: Values = lambda hidden, i: math.sin(1 + 3 * i + sum(7 * j for j in hidden))  # noqa: E731
    spread = {}
    for n in (1, 2, 3):
        draws = [
            (float(p), sum(evaluate(coefficients(s, block), value) for s in states))
            for p, states in every_draw(lambda rng, n=n: elbo_states(block, rng, n))
        ]
        center = sum(p * x for p, x in draws)
        assert center == pytest.approx(evaluate(any_order(2), value))
        spread[n] = sum(p * (x - center) ** 2 for p, x in draws)
    assert spread[2] == pytest.approx(spread[1] / 2)
    assert spread[3] == pytest.approx(spread[1] / 3)


# --- complementary masks ---


@pytest.mark.parametrize("num_pairs", [1, 2])
@pytest.mark.parametrize("prompt_len", [0, 2])
def test_complementary_states_score_each_free_token_once_and_show_the_other_half(
    num_pairs: int, prompt_len: int
) -> None:
    """In every outcome, with blocks of unequal size, whatever the two counts are; given tokens are always shown."""
    blocks = block_slices(prompt_len, 3, 3)
    given = np.array([False, False, True])
    weighed = set()
    for _, states in every_draw(
        lambda rng: sample_complementary_states(blocks, rng, num_pairs, given)  # type: ignore[arg-type]
    ):
        assert len(states) == 2 * num_pairs
        for one, other in zip(states[::2], states[1::2], strict=True):
            assert (one.hidden ^ other.hidden).tolist() == [True, True, False]
            weighed.add(tuple(one.hidden.tolist()))
        assert sum(state.weight for state in states).tolist() == pytest.approx([1, 1, 0])
        for state in states:
            assert (state.scored == state.hidden).all()
            assert (state.coverage == state.weight).all()
            assert set(state.weight.tolist()) <= {0, 1 / num_pairs}
    assert len(weighed) == 4  # every set of the two free tokens is hidden first by some draw


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_complementary_states_weigh_a_hidden_set_by_its_size(size: int) -> None:
    """The mean is sum_l 2 l / (B (B + 1)) of the mean loss of l hidden tokens, times B tokens: not the ELBO."""
    block, free, total = [slice(0, size)], np.zeros(size, dtype=bool), Counter[tuple[frozenset[int], int]]()
    for probability, states in every_draw(
        lambda rng: sample_complementary_states(block, rng, 1, free)  # type: ignore[arg-type]
    ):
        for state in states:
            for key, weight in coefficients(state, block).items():
                total[key] += probability * weight  # type: ignore[assignment]
    expected: Formal = {}
    for count in range(1, size + 1):
        for key, weight in elbo(size, [count]).items():
            expected[key] = weight * Fraction(2 * count, size * (size + 1))
    assert total == expected
    assert size == 1 or total != elbo(size, range(1, size + 1))


# --- orders that are made up, tokens that no step chose, other grids ---


@pytest.mark.parametrize("num_draws", [1, 2, "all"])
@pytest.mark.parametrize("weighting", ["steps", "tokens"])
def test_given_tokens_are_shown_and_never_scored(weighting: Weighting, num_draws: NumDraws) -> None:
    step_of = np.array([GIVEN, 0, 1, 1, GIVEN, GIVEN, NEVER, 0])
    for _, states in every_draw(lambda rng: sample_step_states(step_of, BLOCKS, weighting, rng, num_draws)):
        for state in states:
            given = step_of == GIVEN
            assert not (state.hidden | state.scored)[given].any()
            assert not (state.weight + state.coverage)[given].any()
            assert state.hidden[6]
    expected = {(frozenset({1, 2, 3}), 1), (frozenset({2, 3}), 2), (frozenset({2, 3}), 3), (frozenset({6, 7}), 7)}
    found = mean_of_draws(step_of.tolist(), weighting, num_draws)
    assert found == dict.fromkeys(expected, Fraction(1))


def test_made_up_orders_number_by_number() -> None:
    blocks, given = [slice(0, 3), slice(3, 8)], np.array([0, 0, 0, 1, 0, 0, 0, 0], dtype=bool)
    assert confidence_steps(np.zeros(8), blocks, 2, none_given(blocks)).tolist() == [0, 0, 1, 0, 0, 1, 1, 2]
    assert confidence_steps(np.zeros(8), blocks, 2, given).tolist() == [0, 0, 1, GIVEN, 0, 0, 1, 1]
    confidence = np.array([-3.0, -1, -2, -9, -4, -1, -1, -0.5])
    assert confidence_steps(confidence, blocks, 1, none_given(blocks)).tolist() == [2, 0, 1, 4, 3, 1, 2, 0]
    assert confidence_steps(confidence, blocks, 2, given).tolist() == [1, 0, 0, GIVEN, 1, 0, 1, 0]
    step_of = random_steps(blocks, 2, block_generators(0, "r", 0, "order"), given)
    assert (step_of == GIVEN).tolist() == given.tolist()
    assert sorted(step_of[4:].tolist()) == [0, 0, 1, 1]


def test_sequential_steps_finish_one_block_before_the_next() -> None:
    step_of = np.array([1, 0, NEVER, GIVEN, NEVER, NEVER, 0, 0, 1])
    blocks = [slice(0, 3), slice(3, 6), slice(6, 9)]
    assert sequential_steps(step_of, blocks).tolist() == [1, 0, NEVER, GIVEN, NEVER, NEVER, 2, 2, 3]


def test_dense_steps_keep_given() -> None:
    assert dense_steps(np.array([GIVEN, 7, 3, NEVER]), [slice(0, 4)]).tolist() == [GIVEN, 1, 0, NEVER]


def test_blocks_of_the_response_grid() -> None:
    assert [(s.start, s.stop) for s in block_slices(5, 10, 4, "response")] == [(0, 4), (4, 8), (8, 10)]
    assert block_slices(8, 10, 4, "response") == block_slices(8, 10, 4, "global")


@pytest.mark.parametrize("num_draws", [1, 2, "all"])
def test_unit_divides_by_k_for_any_number_of_draws(num_draws: NumDraws) -> None:
    biased = {(h, i): Fraction(1, {0: 1, 1: 3}[i // 4]) for h, i in full_sum(np.array(UNEQUAL), BLOCKS)}
    total: Counter[tuple[frozenset[int], int]] = Counter()
    sample = lambda rng: sample_step_states(np.array(UNEQUAL), BLOCKS, "unit", rng, num_draws)  # noqa: E731
    for probability, states in every_draw(sample):
        for state in states:
            for key, weight in coefficients(state, BLOCKS).items():
                total[key] += probability * weight  # type: ignore[assignment]
    assert dict(total) == biased


def test_strata_of_tokens_follow_the_order_of_unmasking() -> None:
    step_of = np.array([2, 0, 3, 1])
    draws = every_draw(lambda rng: sample_step_states(step_of, [slice(0, 4)], "tokens", rng, 2))
    seen = {tuple(int(step_of[s.scored][0]) for s in states) for _, states in draws}
    assert seen == {(a, b) for a in (0, 1) for b in (2, 3)}


@pytest.mark.parametrize("num_draws", [1, 2])
@pytest.mark.parametrize("weighting", ["steps", "tokens"])
@pytest.mark.parametrize("before", [[0, 0, 0, 0], [0, 0, 1, 1], [NEVER] * 4])
def test_like_blocks_take_like_draws_whatever_came_before(
    before: list[int], weighting: Weighting, num_draws: int
) -> None:
    """The first block takes one step, two, none or four: the second draws the same."""
    blocks = [slice(0, 4), slice(4, 8)]
    for epoch in range(20):
        one, other = (
            sample_step_states(
                np.array([*first, 0, 1, 2, 3]), blocks, weighting, block_generators(0, "r", epoch, "state"), num_draws
            )
            for first in (before, [0, 1, 2, 3])
        )
        assert [s.scored[4:].tolist() for s in one] == [s.scored[4:].tolist() for s in other]


def test_a_longer_side_changes_no_order_and_no_draw_of_the_blocks_before() -> None:
    def drawn(num_blocks: int) -> tuple[list[int], list[bool]]:
        blocks = [slice(4 * b, 4 * b + 4) for b in range(num_blocks)]
        step_of = random_steps(blocks, 1, block_generators(0, "r", 0, "order"))
        state = sample_step_states(step_of, blocks, "steps", block_generators(0, "r", 0, "state"))[0]
        return step_of[:8].tolist(), state.scored[:8].tolist()

    assert drawn(2) == drawn(3) == drawn(5)


def test_blocks_of_one_row_draw_apart() -> None:
    """Of 400 rows, two blocks of four steps draw the same step in a quarter: they are independent."""
    rows = [block_generators(0, f"row-{i}", 0, "state") for i in range(400)]
    assert abs(np.mean([rng(0).integers(4) == rng(1).integers(4) for rng in rows]) - 0.25) < 0.1
    again = block_generators(0, "row-0", 0, "state")
    assert again(0) is again(0)  # several draws of a block go on in one stream
