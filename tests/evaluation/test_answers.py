"""answers.py against enumeration and the chain rule: scores, batches, ranks, windows, greedy decoding."""

import itertools
import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from networks import AR, EOS, MASK, MASKED, UNIFORM
from small_world import STATES, Denoiser, L, P, V
from test_likelihood import BOUND, CPU, NUMBER, WRONG, conditionals

import diffusion as d
from evaluation import answers, likelihood
from evaluation.answers import Question, Scorer
from training.objective import Objective

NETWORKS = [("masked", MASKED), ("ar", AR), ("uniform", UNIFORM)]


def scorer_of(network, kind="masked", posterior=False, batches=None, **settings):
    """A Scorer of a network; `batches` collects the batches that it reads."""
    objective = Objective(network, posterior)
    if batches is not None:
        plain = objective.nats_at_positions

        def recorded(batch, likeliest=False):
            batches.append(batch)
            return plain(batch, likeliest)

        objective.nats_at_positions = recorded
    c = network.config
    process = d.Process(kind, c.n_vocab, c.mask_id, getattr(c, "seq_len", L))
    return Scorer(objective, process, CPU, **settings)


def score(network, questions, kind="masked", eos_id=EOS, greedy=True, **settings):
    """(log p, greedy hits) of questions."""
    return answers.score(scorer_of(network, kind, **settings), questions, eos_id, greedy=greedy)


def random_ids(rng, n):
    return rng.integers(0, 40, n).tolist()


def log_prior(state, known):
    """log of the probability of the first `known` tokens of a state."""
    return np.log(sum(P[NUMBER[other]] for other in NUMBER if other[:known] == tuple(state[:known])))


# scores against enumeration ---------------------------------------------------------------------------------


def conditional_bound(state, known):
    """The bound of the last positions given the first `known`, by enumeration of orders."""
    orders = itertools.permutations(range(known, L))
    costs = [sum(conditionals(WRONG, [*range(known), *order], state)[known:]) for order in orders]
    return -np.mean(costs)


@pytest.mark.parametrize("known", [0, 1, 2])
def test_short_answers_are_scored_exactly(known):
    """Over every mask: the enumerated bound; for the optimal denoiser the conditional log-probability."""
    questions = [Question(state[:known], state[known:]) for state in STATES.tolist()]
    scores, _ = score(WRONG, questions, eos_id=-1)
    assert -scores == pytest.approx([conditional_bound(state, known) for state in STATES.tolist()], rel=1e-5)
    exact = np.log(P) - [log_prior(state, known) for state in STATES.tolist()]
    assert score(Denoiser("masked"), questions, eos_id=-1)[0] == pytest.approx(exact, rel=1e-4, abs=1e-5)


def test_the_estimator_converges_to_the_enumerated_likelihood():
    """Few masks instead of all seven, many keys: unbiased; the error falls with the number of masks."""
    state, exact = [0, 2, 1], -BOUND[NUMBER[0, 2, 1]]
    errors = []
    for masks in (3, 6):
        questions = [Question([], state, str(key)) for key in range(1000)]
        scores, _ = score(WRONG, questions, eos_id=-1, masks=masks)
        assert abs(scores.mean() - exact) < 4 * scores.std() / math.sqrt(1000) + 1e-6
        errors.append(scores.std())
    assert errors[1] < errors[0]


def test_sampled_masks_every_mask_and_random_orders_agree():
    x = random_ids(np.random.default_rng(0), 10)
    sampled = score(MASKED, [Question([], x, "a")], masks=1000)[0][0]  # there are 2¹⁰ − 1
    every = score(MASKED, [Question([], x, "a")], masks=1023)[0][0]
    rows = torch.tensor([x] * 2000)
    orders = likelihood.chain_rule(Objective(MASKED, False), rows, "random", MASK).sum(1)
    assert -every == pytest.approx(orders.mean(), abs=4 * orders.std() / math.sqrt(2000))
    assert sampled == pytest.approx(every, rel=0.02)


def test_the_published_estimator_means_the_same():
    """benchmarks/sampling.py's rival converges to the same number: its mean over 300 runs."""
    from benchmarks.sampling import score_as_published

    context, answer = [1, 2, 3], [7, 30, 9, 9, 0, 21]
    every = score(MASKED, [Question(context, answer)])[0][0]
    g = torch.Generator().manual_seed(0)
    published = np.array([score_as_published(MASKED, context, answer, 32, 16, g) for _ in range(300)])
    assert abs(published.mean() - every) < 4 * published.std() / math.sqrt(300)


def test_autoregressive_answers_are_the_chain_rule():
    rng, questions = np.random.default_rng(0), []
    for n, m in ((3, 4), (10, 1), (1, 20), (40, 12), (47, 1), (48, 1)):
        questions.append(Question(random_ids(rng, n), random_ids(rng, m)))
    batches = []
    scores, _ = score(AR, questions, "ar", batches=batches)
    assert len(batches) == 1  # all lengths in one batch: what follows does not matter
    for (context, answer, _), value in zip(questions, scores):
        ids = torch.tensor([context + answer])[:, -49:]
        log_p = AR.logits(AR(ids[:, :-1]))[0].log_softmax(-1)
        nats = log_p[torch.arange(ids.shape[1] - 1), ids[0, 1:]][-len(answer) :]
        assert value == pytest.approx(float(nats.sum()), rel=1e-5)


class Known(Denoiser):
    """The uniform process where the first `known` tokens stay clean."""

    def __init__(self, known):
        super().__init__("loo")
        self.known = known

    def forward(self, z, t=None, documents=None, index=None, positions=None, visible=None, clean=None):
        states, prior = torch.tensor(STATES), torch.tensor(P)
        hit = (z[:, None, :] == states[None]).double()
        ratio = torch.tensor(self.schedule.r(t.double().numpy()))[:, :, None]
        likelihood_ = (1 - ratio) * hit + ratio / V
        likelihood_[:, :, : self.known] = hit[:, :, : self.known]
        out = torch.zeros(len(z), L, V, dtype=torch.float64)
        for i in range(L):
            others = likelihood_.clone()
            others[:, :, i] = 1.0
            weight = others.prod(-1) * prior
            for v in range(V):
                out[:, i, v] = weight[:, states[:, i] == v].sum(1)
        logits = torch.log(out / out.sum(-1, keepdim=True).clamp_min(1e-300) + 1e-300)
        return logits.flatten(0, 1)[index]


@pytest.mark.parametrize("known", [0, 1])
def test_uniform_answers_are_bounded_with_the_answer_alone_noised(known):
    """For the optimal denoiser that knows the context: the conditional log-probability, to its error."""
    state = STATES[P.argmax()].tolist()
    questions = [Question(state[:known], state[known:], str(key)) for key in range(150)]
    scores, _ = score(Known(known), questions, "uniform", eos_id=-1, masks=64)
    exact = np.log(P[NUMBER[tuple(state)]]) - log_prior(state, known)
    assert abs(scores.mean() - exact) < 4 * scores.std() / math.sqrt(150)


# random numbers and batches ---------------------------------------------------------------------------------


def test_common_random_numbers_make_differences_of_choices_less_uncertain():
    """Four choices that differ in a few tokens: the variance of their differences is smaller."""
    rng = np.random.default_rng(0)
    context, base = random_ids(rng, 12), rng.integers(0, 40, 16)
    choices = []
    for k in range(4):
        choice = base.copy()
        choice[rng.choice(16, 3, replace=False)] = rng.integers(0, 40, 3)
        choices.append(choice.tolist()[: 16 - k % 2])
    common, own = [], []
    for key in range(60):
        with_common = [Question(context, choice, f"{key}") for choice in choices]
        with_own = [Question(context, choice, f"{key} {k}") for k, choice in enumerate(choices)]
        common.append(score(MASKED, with_common, masks=16)[0])
        own.append(score(MASKED, with_own, masks=16)[0])

    def variance(scores):
        scores = np.array(scores)
        return np.mean([np.var(scores[:, i] - scores[:, j]) for i, j in itertools.combinations(range(4), 2)])

    print(f"variance of differences: {variance(own) / variance(common):.1f} times smaller")
    assert variance(own) > 1.5 * variance(common)
    assert np.mean(common, 0) == pytest.approx(np.mean(own, 0), abs=4 * np.std(own) / math.sqrt(60))


def test_a_single_token_takes_one_pass_for_all_its_rivals():
    batches, rivals = [], (5, 9, 11, 30)
    scores, greedy = score(MASKED, [Question([1, 2, 3], [token], "q") for token in rivals], batches=batches)
    assert len(batches) == 1 and batches[0].tokens.shape == (1, 4) and len(batches[0].targets) == 4
    log_p = MASKED.logits(MASKED(torch.tensor([[1, 2, 3, MASK]])))[0, 3].log_softmax(-1)
    assert scores == pytest.approx(log_p[list(rivals)].numpy(), rel=1e-5)
    best = int(log_p.argmax())
    assert score(MASKED, [Question([1, 2, 3], [best])])[1] == [True]
    assert greedy.tolist() == [token == best for token in rivals]


@pytest.mark.parametrize("kind, network", NETWORKS)
def test_batching_changes_no_score(kind, network):
    """One question at a time, in every order, in large and small batches."""
    rng, questions = np.random.default_rng(0), []
    for q in range(5):
        context = random_ids(rng, rng.integers(1, 30))
        questions += [Question(context, random_ids(rng, rng.integers(1, 9)), f"q{q}") for _ in range(3)]
    together, greedy = score(network, questions, kind, masks=24)
    one_by_one = [score(network, [question], kind, masks=24) for question in questions]
    assert np.concatenate([scores for scores, _ in one_by_one]) == pytest.approx(together, abs=2e-4)
    assert np.concatenate([hits for _, hits in one_by_one]).tolist() == greedy.tolist()
    for tokens in (50, 400, 10**6):
        scores, hits = score(network, questions[::-1], kind, masks=24, pass_tokens=tokens)
        assert scores[::-1] == pytest.approx(together, abs=2e-4) and hits[::-1].tolist() == greedy.tolist()
    assert not greedy.any() or kind != "uniform"


def test_ranks_share_the_work(monkeypatch):
    """What each of three ranks computes, added up, is the whole."""
    rng = np.random.default_rng(0)
    questions = [Question([1, 2], random_ids(rng, n), str(n)) for n in (1, 2, 5, 6, 7, 8, 1)]
    whole, _ = score(MASKED, questions, masks=20)
    parts = []
    monkeypatch.setattr(answers, "greedy_misses", lambda scorer, pieces: np.zeros(len(pieces)))
    monkeypatch.setattr(answers, "sum_over_ranks", lambda ranks, values: values)
    for rank in range(3):
        ranks = SimpleNamespace(rank=rank, world=3)
        parts.append(score(MASKED, questions, masks=20, pass_tokens=60, ranks=ranks)[0])
    assert np.sum(parts, axis=0) == pytest.approx(whole, abs=1e-4)


# what does not fit, and what is empty -----------------------------------------------------------------------


@pytest.mark.parametrize("kind, network", NETWORKS)
def test_a_long_context_is_cut_on_the_left(kind, network):
    rng = np.random.default_rng(0)
    context, answer = random_ids(rng, 100), random_ids(rng, 6)
    size = 48 + (kind == "ar")
    questions = [Question(context[-(size - 6) :], answer, "a"), Question(context, answer, "a")]
    cut, whole = score(network, questions, kind)[0]
    assert cut == pytest.approx(whole, rel=1e-5) and whole < -5


@pytest.mark.parametrize("kind, network", NETWORKS)
def test_a_long_answer_goes_in_windows(kind, network):
    """Each after the tokens before it; the last is filled up with them."""
    rng = np.random.default_rng(0)
    context, answer, size = random_ids(rng, 100), random_ids(rng, 130), 48 + (kind == "ar")
    pairs = answers.windows(answer, context[-1], size)
    assert [token for _, part in pairs for token in part] == answer
    assert all(before and answer[: len(before)] != before for before, _ in pairs[1:])
    assert all(len(before) + len(part) <= size for before, part in pairs)
    assert len(pairs[-1][0]) + len(pairs[-1][1]) == size
    total = score(network, [Question(context, answer, "b")], kind, masks=12)[0][0]
    questions = [Question(before, part, "b" + f" {n}" * (n > 0)) for n, (before, part) in enumerate(pairs)]
    by_window = score(network, questions, kind, masks=12)[0]
    assert total == pytest.approx(sum(by_window), rel=1e-4) and total < -300


def test_empty_contexts_and_empty_answers():
    """Without a context a causal network reads a separator; an empty answer is certain and costs nothing."""
    batches = []
    questions = [Question([], [3, 4]), Question([EOS], [3, 4]), Question([1], []), Question([], [])]
    scores, greedy = score(AR, questions, "ar", batches=batches)
    assert scores[0] == scores[1] < 0 and scores[2:].tolist() == [0, 0] and greedy[2:].all()
    assert len(batches) == 1
    assert score(MASKED, [Question([], []), Question([2], [])])[0].tolist() == [0, 0]
    assert score(UNIFORM, [Question([], [])], "uniform")[0].tolist() == [0]
    assert not score(AR, [Question([1], [2])], "ar", greedy=False)[1].any()


def test_windows_are_those_of_the_harness():
    utils = pytest.importorskip("lm_eval.utils")
    for n in (1, 5, 8, 9, 16, 17, 30):
        ids = list(range(n))
        theirs = [utils.make_disjoint_window(pair) for pair in utils.get_rolling_token_windows(ids, 99, 8, 1)]
        assert answers.windows(ids, 99, 9) == [(list(context), list(part)) for context, part in theirs]


# greedy decoding --------------------------------------------------------------------------------------------


def test_autoregressive_greedy_hits():
    context = ids = [1, 2, 3]
    for _ in range(3):
        ids = ids + [int(AR.logits(AR(torch.tensor([ids])))[0, -1].argmax())]
    other = ids[:5] + [(ids[5] + 1) % 40]
    hits = score(AR, [Question(context, ids[3:]), Question(context, other[3:])], "ar")[1]
    assert hits.tolist() == [True, False]


def test_greedy_is_what_decoding_would_write():
    from sampling import decode

    config = decode.DecodeConfig(order="low_confidence", temperature=0.0)
    row = decode.generate(MASKED, [[3, 4, 5] + [MASK] * 6], config, EOS).rows[0]
    assert score(MASKED, [Question(row[:3], row[3:])])[1] == [True]
    for i in range(3, 9):
        other = row.copy()
        other[i] = (other[i] + 1) % 40
        assert score(MASKED, [Question(other[:3], other[3:])])[1] == [False]


@pytest.mark.slow
@pytest.mark.parametrize("length, factor", [(24, 4), (1, 100)])  # measured: 6.2 and 567
def test_multiple_choice_is_several_times_as_fast_as_published(length, factor):
    """128 masks at GPT-2's vocabulary, against the published loop over requests."""
    from benchmarks import sampling

    model, rng = sampling.random_network(sampling.Config(), 50_257, 256, False), np.random.default_rng(0)
    scorer = Scorer(Objective(model, False), d.Process("masked", 50_257, 50_257, 256), CPU)
    questions = []
    for q in range(4):
        context, answer = rng.integers(0, 50_257, 80), rng.integers(0, 50_257, length)
        questions.append(Question(context.tolist(), answer.tolist(), str(q // 2)))
    answers.score(scorer, questions[:1], 0)
    start = time.perf_counter()
    answers.score(scorer, questions, 0)
    ours = time.perf_counter() - start
    for question in questions:
        sampling.score_as_published(model, question.context, question.answer)
    assert (time.perf_counter() - start - ours) / ours > factor
