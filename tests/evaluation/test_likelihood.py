"""likelihood.py against enumeration: bounds and their errors, chain rules, answers given a context."""

import contextlib
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_decode import AR, EOS, MASK, MASKED, UNIFORM
from test_diffusion import STATES, Denoiser, L, M, P, V

import diffusion as d
from evaluation import likelihood
from evaluation.likelihood import Question, Scorer, answers
from training.distributed import SINGLE
from training.objective import Objective

CPU = torch.device("cpu")
H = -(P * np.log(P)).sum()  # nats per block
NUMBER = {tuple(state): i for i, state in enumerate(STATES.tolist())}


class Text:
    """Blocks drawn from P."""

    def __init__(self, seed, n=4096):
        self.available, self.states = n, STATES[np.random.default_rng(seed).choice(len(P), n, p=P)]

    def read(self, index):
        return np.concatenate((np.zeros((len(index), 1), np.int32), self.states[index]), axis=1)


def read(process, blocks, ids, rows, which, valid=None, spacing=None):
    return d.make_batch(process, blocks.read(ids), rows, which, valid, spacing)


def measure(denoiser, kind, seed=0, n=256, passes=1, micro=64, posterior=False, schedule="linear"):
    process = likelihood.validation_process(d.Process("masked" if kind == "masked" else "uniform", V, M, L), schedule)._replace(seed=seed)
    return likelihood.evaluate(Objective(denoiser, posterior), process, Text(seed, n), n, micro, SINGLE, CPU, contextlib.nullcontext, read, passes)


def conditionals(denoiser, order, state):
    """log p of each token of `state`, masked positions opened in `order`, from the network directly."""
    z, total = torch.full((1, L), M), []
    for i in order:
        total.append(float(denoiser(z)[0, i].log_softmax(-1)[state[i]]))
        z[0, i] = state[i]
    return total


ORDERS = list(itertools.permutations(range(L)))
WRONG = Denoiser("masked", mistake=0.5)
BOUND = np.array([-np.mean([sum(conditionals(WRONG, order, state)) for order in ORDERS]) for state in STATES.tolist()])  # of each state: the mean over orders
EXACT = np.array([-np.log(np.mean([np.exp(sum(conditionals(WRONG, order, state))) for order in ORDERS])) for state in STATES.tolist()])


# the bound ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, posterior, schedule", [("masked", False, "linear"), ("loo", False, "linear"), ("loo", False, "cosine"), ("posterior", True, "linear")])
def test_the_optimal_denoiser_scores_the_entropy(kind, posterior, schedule):
    found = measure(Denoiser(kind, schedule), kind, n=4096, passes=2, micro=512, posterior=posterior, schedule=schedule)
    error, noise = likelihood.standard_error(found)
    assert 0 < noise < error < 0.02
    assert abs(sum(found.parts) - H / L) < 3.5 * error


def test_bound_exact_likelihood_and_entropy_are_in_order():
    """For a network that is wrong: bound ≥ exact NLL of its sampler ≥ entropy, and the figure that is measured is the bound."""
    assert (P * BOUND).sum() > (P * EXACT).sum() + 0.01 > H + 0.02
    found = measure(WRONG, "masked", n=4096, micro=512)
    assert abs(sum(found.parts) - (P * BOUND).sum() / L) < 3.5 * likelihood.standard_error(found)[0]


@pytest.mark.parametrize("kind, passes, n", [("masked", 1, 64), ("masked", 4, 64), ("wrong", 1, 48), ("wrong", 2, 64), ("loo", 1, 256), ("loo", 3, 256), ("posterior", 1, 256), ("ar", 1, 64)])
def test_error_bars_cover_the_truth_at_their_rate(kind, passes, n):
    """200 repeats with other text and other noise: 95 % intervals hold the truth 95 % of the time (91 to 98.5: four of five binomial errors)."""
    truth, denoiser = H / L, WRONG if kind == "wrong" else Denoiser(kind)
    if kind == "wrong":
        truth = (P * BOUND).sum() / L
    inside = []
    for seed in range(200):
        if kind == "ar":  # no noise: each block's own exact NLL
            values = -np.log(P)[[NUMBER[tuple(s)] for s in Text(seed, n).states.tolist()]] / L
            found = likelihood.Measured(values[None, :, None], np.arange(n)[None], [])
        else:
            found = measure(denoiser, "masked" if kind == "wrong" else kind, seed, n, passes, posterior=kind == "posterior")
        inside.append(abs(sum(found.parts) - truth) < 1.96 * likelihood.standard_error(found, exact=kind == "ar")[0])
    assert 0.91 <= np.mean(inside) <= 0.985, np.mean(inside)


def test_the_noise_alone_has_its_own_error():
    """The same text with other noise, 60 times: the estimates vary as much as `noise` says, and far less than text and noise together."""
    process, text, means, noise = d.Process("masked", V, M, L), Text(0, 64), [], []
    for seed in range(60):
        found = likelihood.evaluate(Objective(WRONG, False), process._replace(seed=seed), text, 64, 64, SINGLE, CPU, contextlib.nullcontext, read, 3)
        means.append(sum(found.parts))
        noise.append(likelihood.standard_error(found)[1])
    assert np.std(means) == pytest.approx(np.mean(noise), rel=0.25)


def test_plain_variance_would_be_too_large():
    """Under a lattice the levels themselves have no error; the estimator leaves their trend out."""
    process = d.Process("masked", V, M, L)

    class Steep(Denoiser):  # hard where much is masked, easy elsewhere, hardly any chance in it
        def forward(self, z, t=None, documents=None, index=None, positions=None):
            logits = torch.zeros(*z.shape, V, dtype=torch.float64)
            logits[..., 0] = 3.0 * (3 - (z == M).sum(1))[:, None]
            return logits if index is None else logits.flatten(0, 1)[index]

    found = likelihood.evaluate(Objective(Steep("masked"), False), process, Text(0, 300), 300, 64, SINGLE, CPU, contextlib.nullcontext, read)
    plain = found.values.std(ddof=1) / math.sqrt(300)
    assert likelihood.standard_error(found)[0] < 0.9 * plain


def test_differences_of_models_are_better_known_than_the_models():
    one, other = measure(WRONG, "masked", n=512), measure(Denoiser("masked", mistake=0.4), "masked", n=512)
    mean, error = likelihood.difference(one.rows, other.rows)
    assert mean == pytest.approx(sum(one.parts) - sum(other.parts), rel=1e-9)
    assert error < 0.5 * math.hypot(likelihood.standard_error(one)[0], likelihood.standard_error(other)[0])
    some = (other.rows[0][::2], other.rows[1][::2])
    assert likelihood.difference(one.rows, some)[0] == pytest.approx(np.mean(one.rows[1][::2] - some[1]), rel=1e-9)
    assert likelihood.difference(one.rows, (other.rows[0][:5], other.rows[1][:5])) is None
    again = measure(WRONG, "masked", n=512, passes=3)
    assert sorted(again.rows[0]) == list(range(512)) and again.rows[1].mean() == pytest.approx(sum(again.parts))
    block = int(again.rows[0][7])
    assert again.rows[1][7] == pytest.approx(np.mean([again.values[p, again.blocks[p].tolist().index(block), 0] for p in range(3)]))


def test_the_curve_integrates_to_the_bound():
    found = measure(WRONG, "masked", n=3000, micro=1000)
    curve = list(likelihood.noise_curve(found, d.Process("masked", V, M, L), 3).values())
    assert [round(line[0] * L) for line in curve] == [1, 2, 3] and sum(line[3] for line in curve) == 3000
    assert sum(line[1] * line[3] for line in curve) / 3000 == pytest.approx(sum(found.parts))
    for k, (_, nats, error, _) in enumerate(curve, 1):  # C_k by enumeration
        exact = np.mean([[-conditionals(WRONG, order, state)[L - k] for order in ORDERS] for state in STATES.tolist()], axis=1) @ P
        assert abs(nats - exact) < 4 * error


# chain rules --------------------------------------------------------------------------------------------------------------------


def chain(denoiser, order, seed=0):
    return likelihood.chain(Objective(denoiser, False), STATES, order, M, CPU, contextlib.nullcontext, seed)


@pytest.mark.parametrize("order", ["left_to_right", "confidence", "random"])
def test_every_order_of_the_optimal_denoiser_is_the_distribution(order):
    assert chain(Denoiser("masked"), order).sum(1) == pytest.approx(-np.log(P), rel=1e-5)


def test_chain_rules_equal_enumeration():
    found = chain(WRONG, "left_to_right")
    for state, nats in zip(STATES.tolist(), found):
        assert -nats == pytest.approx(conditionals(WRONG, range(L), state), rel=1e-5)
    surest = chain(WRONG, "confidence")
    for state, nats in zip(STATES.tolist(), surest):
        z, total = torch.full((1, L), M), np.zeros(L)
        for _ in range(L):
            probs = WRONG(z)[0].softmax(-1).float().max(-1).values
            i = int(torch.where(z[0] == M, (probs * 4096).round(), -1).argmax())
            total[i] = float(WRONG(z)[0, i].log_softmax(-1)[state[i]])
            z[0, i] = state[i]
        assert -nats == pytest.approx(total, rel=1e-4)
    for nats in (found, surest):  # both are distributions over all states, so no better than the entropy
        assert np.exp(-nats.sum(1)).sum() == pytest.approx(1, rel=1e-5) and (P * nats.sum(1)).sum() >= H
    random = np.mean([chain(WRONG, "random", seed).sum(1) for seed in range(300)], axis=0)
    assert random == pytest.approx(BOUND, rel=0.05)


# answers ------------------------------------------------------------------------------------------------------------------------


def scorer(network, kind="masked", posterior=False, looks=None, **more):
    """A Scorer of a network; `looks` collects the batches that it saw."""
    objective = Objective(network, posterior)
    if looks is not None:
        plain = objective.look
        objective.look = lambda batch, likeliest=False: looks.append(batch) or plain(batch, likeliest)
    c = network.config
    return Scorer(objective, d.Process(kind, c.n_vocab, c.mask_id, getattr(c, "seq_len", L)), CPU, **more)


def conditional_bound(state, known):
    """The bound of the last positions given the first `known`, by enumeration of orders."""
    orders = list(itertools.permutations(range(known, L)))
    return -np.mean([sum(conditionals(WRONG, [*range(known), *order], state)[known:]) for order in orders])


@pytest.mark.parametrize("known", [0, 1, 2])
def test_short_answers_are_scored_exactly(known):
    """Over every mask: the enumerated conditional bound, for the optimal denoiser the conditional log-probability itself."""
    questions = [Question(state[:known], state[known:]) for state in STATES.tolist()]
    found, _ = answers(scorer(WRONG), questions, -1)
    assert -found == pytest.approx([conditional_bound(state, known) for state in STATES.tolist()], rel=1e-5)
    given = np.array([sum(P[NUMBER[other]] for other in NUMBER if list(other[:known]) == state[:known]) for state in STATES.tolist()])
    assert answers(scorer(Denoiser("masked")), questions, -1)[0] == pytest.approx(np.log(P / given), rel=1e-4, abs=1e-5)


def test_the_estimator_converges_to_the_enumerated_likelihood():
    """Three masks instead of all seven, many keys: unbiased; the error falls with the number of masks."""
    state, exact = [0, 2, 1], -BOUND[NUMBER[0, 2, 1]]
    errors = []
    for samples, n in ((3, 1000), (6, 1000)):
        found = answers(scorer(WRONG, samples=samples), [Question([], state, str(key)) for key in range(n)], -1)[0]
        assert abs(found.mean() - exact) < 4 * found.std() / math.sqrt(n) + 1e-6
        errors.append(found.std())
    assert errors[1] < errors[0]
    # long answers, a real network: 4 000 masks against the mean over random orders' chain rules
    x = np.random.default_rng(0).integers(0, 40, 10).tolist()
    many = answers(scorer(MASKED, samples=1000), [Question([], x, "a")], EOS)[0][0]  # 2¹⁰ − 1 masks: sampled
    every = answers(scorer(MASKED, samples=1023), [Question([], x, "a")], EOS)[0][0]
    orders = likelihood.chain(Objective(MASKED, False), np.tile(x, (2000, 1)), "random", MASK, CPU, contextlib.nullcontext).sum(1)
    assert -every == pytest.approx(orders.mean(), abs=4 * orders.std() / math.sqrt(2000))
    assert many == pytest.approx(every, rel=0.02)


def test_the_published_estimator_means_the_same():
    """What sampling.py races against converges to the same number: its mean over 300 runs, 6 tokens, all masks here."""
    from benchmarks.sampling import score_as_published

    context, answer = [1, 2, 3], [7, 30, 9, 9, 0, 21]
    every = answers(scorer(MASKED), [Question(context, answer)], EOS)[0][0]
    g = torch.Generator().manual_seed(0)
    found = np.array([score_as_published(MASKED, context, answer, 32, 16, g) for _ in range(300)])
    assert abs(found.mean() - every) < 4 * found.std() / math.sqrt(300)


def test_common_random_numbers_make_differences_of_choices_less_uncertain():
    """Four choices that differ in a few tokens: the variance of their differences, with common and with separate numbers."""
    rng = np.random.default_rng(0)
    context, base = rng.integers(0, 40, 12).tolist(), rng.integers(0, 40, 16)
    choices = []
    for k in range(4):
        choice = base.copy()
        choice[rng.choice(16, 3, replace=False)] = rng.integers(0, 40, 3)
        choices.append(choice.tolist()[: 16 - k % 2])
    question = scorer(MASKED, samples=16)
    common = [answers(question, [Question(context, choice, f"{key}") for choice in choices], EOS)[0] for key in range(60)]
    apart = [answers(question, [Question(context, choice, f"{key} {k}") for k, choice in enumerate(choices)], EOS)[0] for key in range(60)]
    variance = [np.mean([np.var([f[i] - f[j] for f in found]) for i, j in itertools.combinations(range(4), 2)]) for found in (common, apart)]
    print(f"variance of differences: {variance[1] / variance[0]:.1f} times smaller with common random numbers")
    assert variance[1] > 1.5 * variance[0]
    assert np.mean(common, 0) == pytest.approx(np.mean(apart, 0), abs=4 * np.std(apart) / math.sqrt(60))


def test_a_token_alone_takes_one_pass_for_all_its_rivals():
    looks = []
    found, greedy = answers(scorer(MASKED, looks=looks), [Question([1, 2, 3], [token], "q") for token in (5, 9, 11, 30)], EOS)
    assert len(looks) == 1 and looks[0].tokens.shape == (1, 4) and len(looks[0].targets) == 4
    logits = MASKED.logits(MASKED(torch.tensor([[1, 2, 3, MASK]])))[0, 3].log_softmax(-1)
    assert found == pytest.approx(logits[[5, 9, 11, 30]].numpy(), rel=1e-5)
    best = int(logits.argmax())
    assert answers(scorer(MASKED), [Question([1, 2, 3], [best])], EOS)[1] == [True] and greedy.tolist() == [token == best for token in (5, 9, 11, 30)]


def test_autoregressive_answers_are_the_chain_rule():
    rng, questions = np.random.default_rng(0), []
    for n, m in ((3, 4), (10, 1), (1, 20), (40, 12), (47, 1), (48, 1)):
        questions.append(Question(rng.integers(0, 40, n).tolist(), rng.integers(0, 40, m).tolist()))
    looks = []
    found, greedy = answers(scorer(AR, "ar", looks=looks), questions, EOS)
    assert len(looks) == 1  # all lengths in one batch: what follows does not matter
    for (context, answer, _), value in zip(questions, found):
        ids = torch.tensor([context + answer])[:, -49:]
        nats = AR.logits(AR(ids[:, :-1]))[0].log_softmax(-1)[torch.arange(ids.shape[1] - 1), ids[0, 1:]][-len(answer) :]
        assert value == pytest.approx(float(nats.sum()), rel=1e-5)
    context = questions[0].context
    for _ in range(3):
        context = context + [int(AR.logits(AR(torch.tensor([context])))[0, -1].argmax())]
    assert answers(scorer(AR, "ar"), [Question(context[:3], context[3:])], EOS)[1] == [True]
    assert answers(scorer(AR, "ar"), [Question(context[:3], context[3:5] + [(context[5] + 1) % 40])], EOS)[1] == [False]


@pytest.mark.parametrize("kind, network", [("masked", MASKED), ("ar", AR), ("uniform", UNIFORM)])
def test_batching_changes_no_score(kind, network):
    """One question at a time, in every order, in large and small batches, on one rank or three."""
    rng, questions = np.random.default_rng(0), []
    for q in range(5):
        context = rng.integers(0, 40, rng.integers(1, 30)).tolist()
        questions += [Question(context, rng.integers(0, 40, rng.integers(1, 9)).tolist(), f"q{q}") for _ in range(3)]
    whole, greedy = answers(scorer(network, kind, samples=24), questions, EOS)
    alone = [answers(scorer(network, kind, samples=24), [question], EOS) for question in questions]
    assert np.concatenate([found for found, _ in alone]) == pytest.approx(whole, abs=2e-4) and np.concatenate([g for _, g in alone]).tolist() == greedy.tolist()
    for tokens in (50, 400, 10**6):
        found, again = answers(scorer(network, kind, samples=24, tokens=tokens), questions[::-1], EOS)
        assert found[::-1] == pytest.approx(whole, abs=2e-4) and again[::-1].tolist() == greedy.tolist()
    assert not greedy.any() or kind != "uniform"


def test_ranks_share_the_work(monkeypatch):
    """What one of three ranks computes, added up, is the whole; each takes part in as many passes."""
    rng = np.random.default_rng(0)
    questions = [Question([1, 2], rng.integers(0, 40, n).tolist(), str(n)) for n in (1, 2, 5, 6, 7, 8, 1)]
    whole = answers(scorer(MASKED, samples=20), questions, EOS)[0]
    parts, passes = [], []
    for rank in range(3):
        looks = []
        monkeypatch.setattr(likelihood, "not_written", lambda scorer, pieces: np.zeros(len(pieces)))
        monkeypatch.setattr(likelihood, "summed", lambda ranks, values: values)
        parts.append(answers(scorer(MASKED, looks=looks, samples=20, tokens=60, ranks=SimpleNamespace(rank=rank, world=3)), questions, EOS)[0])
        passes.append(len(looks))
    assert np.sum(parts, axis=0) == pytest.approx(whole, abs=1e-4) and len(set(passes)) == 1


@pytest.mark.parametrize("kind, network", [("masked", MASKED), ("ar", AR), ("uniform", UNIFORM)])
def test_what_is_too_long_is_cut_on_the_left(kind, network):
    rng = np.random.default_rng(0)
    context, answer = rng.integers(0, 40, 100).tolist(), rng.integers(0, 40, 6).tolist()
    size = 48 + (kind == "ar")
    cut, whole = answers(scorer(network, kind), [Question(context[-(size - 6) :], answer, "a"), Question(context, answer, "a")], EOS)[0]
    assert cut == pytest.approx(whole, rel=1e-5) and whole < -5
    long = rng.integers(0, 40, 130).tolist()  # an answer that is too long itself: in windows, each after what came before
    score = scorer(network, kind, samples=12)
    pieces = likelihood.windows(long, context[-1], size)
    assert [token for _, part in pieces for token in part] == long and all(len(c) + len(part) <= size for c, part in pieces)
    assert all(c and long[: len(c)] != c or n == 0 for n, (c, _) in enumerate(pieces)) and len(pieces[-1][0]) + len(pieces[-1][1]) == size
    total = answers(score, [Question(context, long, "b")], EOS)[0][0]
    parts = [Question(c, part, "b" + f" {n}" * (n > 0)) for n, (c, part) in enumerate(pieces)]
    assert total == pytest.approx(sum(answers(score, parts, EOS)[0]), rel=1e-4) and total < -300


def test_nothing_before_and_nothing_asked():
    """Without a context a causal network reads a separator; an empty answer is certain and costs nothing."""
    looks = []
    found, greedy = answers(scorer(AR, "ar", looks=looks), [Question([], [3, 4]), Question([EOS], [3, 4]), Question([1], []), Question([], [])], EOS)
    assert found[0] == found[1] < 0 and found[2:].tolist() == [0, 0] and greedy[2:].all() and len(looks) == 1
    assert answers(scorer(MASKED), [Question([], []), Question([2], [])], EOS)[0].tolist() == [0, 0]
    assert answers(scorer(UNIFORM, "uniform"), [Question([], [])], EOS)[0].tolist() == [0]
    assert not answers(scorer(AR, "ar"), [Question([1], [2])], EOS, greedy=False)[1].any()


def test_windows_are_those_of_the_harness():
    utils = pytest.importorskip("lm_eval.utils")
    for n in (1, 5, 8, 9, 16, 17, 30):
        ids = list(range(n))
        theirs = [utils.make_disjoint_window(pair) for pair in utils.get_rolling_token_windows(ids, 99, 8, 1)]
        assert likelihood.windows(ids, 99, 9) == [(list(c), list(part)) for c, part in theirs]


class Known(Denoiser):
    """The uniform process where the first `known` tokens stay clean."""

    def __init__(self, known):
        super().__init__("loo")
        self.known = known

    def forward(self, z, t=None, documents=None, index=None, positions=None):
        states, prior = torch.tensor(STATES), torch.tensor(P)
        hit = (z[:, None, :] == states[None]).double()
        ratio = torch.tensor(self.schedule.r(t.double().numpy()))[:, None, None]
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
    """The optimal denoiser that knows which tokens are given: the conditional log-probability, within the error of many keys."""
    state = STATES[P.argmax()].tolist()
    given = sum(P[NUMBER[other]] for other in NUMBER if list(other[:known]) == state[:known])
    found = answers(scorer(Known(known), "uniform", samples=64), [Question(state[:known], state[known:], str(key)) for key in range(150)], -1)[0]
    assert abs(found.mean() - np.log(P[NUMBER[tuple(state)]] / given)) < 4 * found.std() / math.sqrt(150)


def test_greedy_is_what_decoding_would_write():
    from sampling import decode

    written = decode.generate(MASKED, [[3, 4, 5] + [MASK] * 6], decode.DecodeConfig(order="low_confidence", temperature=0.0), EOS).rows[0]
    assert answers(scorer(MASKED), [Question(written[:3], written[3:])], EOS)[1] == [True]
    for i in range(3, 9):
        other = written.copy()
        other[i] = (other[i] + 1) % 40
        assert answers(scorer(MASKED), [Question(other[:3], other[3:])], EOS)[1] == [False]


@pytest.mark.slow
def test_multiple_choice_is_several_times_as_fast_as_published():
    """128 masks at GPT-2's vocabulary, long answers: at least four times as fast as the published loop over requests (measured: 6.2); of one token: a hundred times (567)."""
    import time

    from benchmarks import sampling

    model, rng = sampling.random_network(sampling.Config(), 50_257, 256, False), np.random.default_rng(0)
    judge = Scorer(Objective(model, False), d.Process("masked", 50_257, 50_257, 256), CPU)
    for length, factor in ((24, 4), (1, 100)):
        questions = [Question(rng.integers(0, 50_257, 80).tolist(), rng.integers(0, 50_257, length).tolist(), str(q // 2)) for q in range(4)]
        answers(judge, questions[:1], 0)
        start = time.perf_counter()
        answers(judge, questions, 0)
        ours = time.perf_counter() - start
        for question in questions:
            sampling.score_as_published(model, question.context, question.answer)
        assert (time.perf_counter() - start - ours) / ours > factor, length
