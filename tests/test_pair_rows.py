"""Question-answer pairs in rows: packed whole, each a document, its answer alone noised and scored."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import AR, EOS, MASK, UNIFORM, network
from small_world import to_tensors
from test_likelihood import CPU

import data
import diffusion
import train
from corpus.pairs import PairIndex
from corpus.stream import Stream
from data import PairLayout, PairRows
from evaluation import answers
from training.objective import Objective

LENGTH, PACKED = 24, PairLayout()
LAYOUTS = st.builds(PairLayout, st.booleans(), st.sampled_from(["cut", "skip"]),
                    st.sampled_from(["none", "block", "row"]), st.sampled_from([1, 4, 5]))
SIZES = st.lists(st.tuples(st.integers(1, 14), st.integers(1, 14)), min_size=1, max_size=40)
BLOCKS = network(diffusion_block=4)
NETWORKS = dict(ar=AR, masked=network(), uniform=UNIFORM, block=BLOCKS, shifted=network(shift=True))
COUNT = dict(ar="ar", uniform="uniform")  # objectives by their networks' names; the rest is masked


def make_pairs(sizes, seed=0):
    """[(prompt, answer)] of random tokens; an answer ends with a separator."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, EOS, a).tolist(), [*rng.integers(0, EOS, b - 1).tolist(), EOS])
            for a, b in sizes]


def rows_of(pairs, layout=PACKED, length=LENGTH, **others):
    """PairRows of pairs in memory, in two files."""
    tokens = np.array([EOS, *(token for pair in pairs for part in pair for token in part)], np.uint16)
    n_prompt, n_answer = (np.array([len(part) for part in parts]) for parts in zip(*pairs))
    size = n_prompt + n_answer
    index = PairIndex(1 + np.cumsum(size) - size, n_prompt, n_answer)
    stream = Stream([tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]])
    return PairRows(stream, index, length, EOS, layout, **others)


def process_of(name, length=LENGTH, **others):
    return diffusion.Process(COUNT.get(name, "masked"), 41, MASK, length,
                             block=4 if name == "block" else 0, **others)


def batch_of(name, sequences, ids=None, first=0, **others):
    """A batch of the rows `ids`, as train.py reads it, and the positions that count."""
    ids = np.arange(sequences.n) if ids is None else np.asarray(ids)
    process = process_of(name, sequences.length, **others)
    eligible = sequences.eligible(ids)
    counts = data.count_by_block(process, eligible)
    levels = diffusion.noise_levels(process, first, len(ids), n_eligible=counts)
    cfg = train.Config(seq_len=sequences.length, objective=process.objective)
    rows = np.arange(len(ids))
    return data.read_batch(cfg, EOS, process, sequences, ids, levels, rows, eligible), eligible


# ---------------------------------------------------------------------------------------------------- packing


@settings(max_examples=150, deadline=None)
@given(SIZES, LAYOUTS, st.integers(0, 3))
def test_every_epoch_reads_every_pair_once(sizes, layout, seed):
    """Whole, or cut as the layout says, in any order; what is left out is counted."""
    pairs = make_pairs(sizes)
    fits = [len(p) + len(a) <= LENGTH if layout.long_pairs == "skip" else len(p) < LENGTH for p, a in pairs]
    if not any(fits):
        with pytest.raises(ValueError, match="no question-answer pair that has a place"):
            rows_of(pairs, layout)
        return
    sequences = rows_of(pairs, layout, seed=seed)
    is_long = [len(p) + len(a) > LENGTH for p, a in pairs]
    assert sequences.n_skipped == len(pairs) - sum(fits)
    assert sequences.n_cut == sum(fit and long for fit, long in zip(fits, is_long))

    ids = sequences.ids(np.arange(sequences.n))
    assert sorted(ids) == list(range(sequences.n))  # of the first epoch, and of another:
    assert sorted(sequences.ids(7 * sequences.n + np.arange(sequences.n))) == list(range(sequences.n))
    rows, eligible = sequences.read(ids), sequences.eligible(ids)
    numbers = sequences.documents(ids, rows, EOS, False)
    assert (rows[:, 0] == EOS).all() and (rows[:, 1:][numbers < 0] == EOS).all()
    assert (numbers[eligible] >= 0).all()
    found = []
    for row, number, counts in zip(rows[:, 1:], numbers, eligible):
        members = [n for n in dict.fromkeys(number.tolist()) if n >= 0]
        assert members == list(range(len(members)))
        assert len(members) == 1 or layout.packing and layout.eos_padding != "row"
        for n in members:
            place = np.flatnonzero(number == n)
            assert (np.diff(place) == 1).all() and place[0] % layout.block == 0
            n_prompt = int(np.argmax(counts[place]))
            assert counts[place][n_prompt:].all() and not counts[place][:n_prompt].any()
            tokens = row[place].tolist()
            found.append((tokens[:n_prompt], tokens[n_prompt:]))

    expected = []
    for (prompt, answer), fit, long in zip(pairs, fits, is_long):
        size = len(prompt) + len(answer)
        end = dict(none=size, row=LENGTH, block=-(-size // layout.block) * layout.block)[layout.eos_padding]
        answer = answer if long else answer + [EOS] * (min(end, LENGTH) - size)
        expected += [(prompt, answer[: LENGTH - len(prompt)])] * fit
    assert sorted(found) == sorted(expected)
    assert sequences.n_pairs(ids) == len(found)


def test_a_cut_answer_gets_no_separator():
    """Cut by one token it loses just that; as long as the row it keeps it."""
    sequences = rows_of([([1, 2], [3] * 22 + [EOS]), ([4, 5], [6] * 21 + [EOS])])
    rows = {row[1]: row for row in sequences.read(np.arange(2)).tolist()}
    assert rows[1] == [EOS, 1, 2] + [3] * 22 and rows[4] == [EOS, 4, 5] + [6] * 21 + [EOS]
    assert sequences.n_cut == 1


def test_packing_leaves_few_gaps_and_is_fast():
    """Within 1 % of the tokens, 100,000 pairs in seconds; rows do not sort pairs by length."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(2, 200, 100_000)
    rows = data.pack_rows(sizes, 512, 0)
    used = np.bincount(rows, sizes)
    assert used.max() <= 512 and len(used) < 1.01 * sizes.sum() / 512 + 1
    n_pairs = np.bincount(rows)[:-50]  # the last are filled with what is left
    assert n_pairs.mean() > 5 and n_pairs.std() < 2


def test_spans():
    assert data.spans(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert data.spans(np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.lists(st.integers(0, 10**6), max_size=20))
def test_a_stream_gives_tokens_at_any_places(sizes, places):
    arrays = [np.arange(size, dtype=np.uint16) + 100 * i for i, size in enumerate(sizes)]
    stream, places = Stream(arrays), np.array([place % sum(sizes) for place in places], np.int64)
    assert stream.take(places).tolist() == np.concatenate(arrays)[places].tolist()


# ------------------------------------------------------------------------------------ noise, weights, padding


@pytest.mark.parametrize("name", ("masked", "uniform", "block"))
@pytest.mark.parametrize("layout", (PairLayout(block=4), PairLayout(eos_padding="row", block=4)), ids=str)
def test_no_prompt_token_is_noised_or_scored(name, layout):
    """Over 100,000 draws of prompt and padding tokens; half of the answers' tokens are noised."""
    pairs = make_pairs([(5, 6), (9, 3), (2, 2), (12, 12), (3, 1)])
    sequences = rows_of(pairs, layout)
    ids = np.tile(np.arange(sequences.n), 1 + 200_000 // (sequences.n * LENGTH) * 3)
    batch, eligible = batch_of(name, sequences, ids)
    x = sequences.read(ids)[:, 1:]
    assert (~eligible).sum() > 1e5
    changed = batch.tokens != x
    assert not changed[~eligible].any()
    if name != "uniform":
        assert (batch.tokens[eligible & changed] == MASK).all()
        places = batch.index[batch.weights[:, 0] > 0]
        assert eligible.reshape(-1)[places].all()
        assert 0.5 < changed[eligible].mean() < 0.7  # k of n is at least 1
    else:
        assert (batch.weights.reshape(*eligible.shape, -1)[~eligible] == 0).all()
    if name == "block":
        assert (batch.clean == x).all()


def test_the_gradient_on_padding_is_as_the_setting_says():
    """No separator behind the one that closes an answer has weight, or all to the block's or row's end."""
    pairs = make_pairs([(5, 6)])
    for padding, n in (("none", 6), ("block", 7), ("row", LENGTH - 5)):
        sequences = rows_of(pairs, PairLayout(eos_padding=padding, block=4))
        batch, eligible = batch_of("ar", sequences)
        weights = batch.weights.reshape(1, LENGTH)
        assert (weights > 0).tolist() == eligible.tolist() and int(eligible.sum()) == n
        hidden = torch.randn(1, LENGTH, 48, requires_grad=True)
        tensors = to_tensors(batch)
        loss = diffusion.loss_figures(hidden, AR.head, tensors, 41)["loss"]
        loss.backward()
        assert (hidden.grad.abs().sum(-1) > 0).tolist() == eligible.tolist()


@pytest.mark.parametrize("name, estimator", [
    *((name, "count") for name in NETWORKS), ("masked", "ratio"), ("masked", "time"), ("block", "ratio")])
def test_a_row_of_prompts_only_is_zero(name, estimator):
    """Beside other rows, and in a step that has nothing else: zero loss and gradient, nowhere NaN."""
    model = network(causal=name == "ar", timed=name == "uniform", diffusion_block=4 if name == "block" else 0)
    model.requires_grad_(True)
    process = process_of(name, 8, estimator=estimator)
    x = np.arange(18).reshape(2, 9)
    losses = []
    for eligible in (np.zeros((2, 8), bool), np.arange(16).reshape(2, 8) >= 11):
        counts = data.count_by_block(process, eligible)
        levels = diffusion.noise_levels(process, 0, 2, n_eligible=counts)
        batch = diffusion.make_batch(process, x, levels, np.arange(2), eligible)
        assert np.isfinite(batch.weights).all()
        model.zero_grad(set_to_none=False)
        loss = Objective(model, False)(to_tensors(batch))["loss"]
        loss.backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
        losses.append(float(loss.detach()))
        if not eligible.any():
            assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert losses[0] == 0 and losses[1] > 0


# ------------------------------------------------------------------------------------- packed, and one by one


@pytest.mark.parametrize("name", NETWORKS)
def test_packed_is_one_pair_a_row(name):
    """In a packed row an answer has the hidden states that it has in a row of its own, with equal noise."""
    pairs = make_pairs([(5, 6), (3, 4), (2, 3), (9, 12), (4, 1)])
    layout = PairLayout(block=4 if name == "block" else 1)
    sequences = rows_of(pairs, layout)
    assert sequences.n < len(pairs)
    batch, eligible = batch_of(name, sequences)
    ids = np.arange(sequences.n)
    x, documents = sequences.read(ids), sequences.documents(ids, None, EOS, name == "ar")
    model = NETWORKS[name]

    def states(tokens, clean, time, documents=None, positions=None):
        parts = [None if part is None else torch.as_tensor(part) for part in (documents, positions)]
        time = None if time is None else torch.as_tensor(time)
        clean = None if clean is None else torch.as_tensor(clean)
        with torch.no_grad():
            return model(torch.as_tensor(tokens), time, parts[0], None, parts[1], clean=clean)

    tokens = x[:, :-1] if name == "ar" else batch.tokens
    packed = states(tokens, batch.clean, batch.time, batch.documents, batch.positions)
    n_compared = 0
    for row in ids:
        for number in range(documents[row].max() + 1):
            place = np.flatnonzero(documents[row] == number)
            time = None if batch.time is None else batch.time[row : row + 1]
            clean = None if batch.clean is None else batch.clean[row, place][None]
            alone = states(tokens[row, place][None], clean, time)
            inside = torch.as_tensor(eligible[row, place])
            torch.testing.assert_close(packed[row, place][inside], alone[0][inside], rtol=0, atol=2e-5)
            n_compared += int(inside.sum())
    assert n_compared == sum(len(answer) for _, answer in pairs)


@pytest.mark.parametrize("name", ("ar", "masked", "uniform", "block"))
@pytest.mark.parametrize("packing", (True, False))
def test_the_training_loss_is_the_evaluators_conditional_bound(name, packing):
    """Of answers.py, which builds its rows otherwise and enumerates masks: for single and packed pairs."""
    pairs = make_pairs([(5, 4), (3, 3), (7, 1), (2, 5)])
    sequences = rows_of(pairs, PairLayout(packing, block=4 if name == "block" else 1))
    model = NETWORKS[name]
    scorer = answers.Scorer(Objective(model, False), process_of(name, 48), CPU, masks=8192)
    context = [EOS] if name == "ar" else []  # a causal network reads one before a document, as in sample.py
    questions = [answers.Question([*context, *prompt], answer, key=str(i))
                 for i, (prompt, answer) in enumerate(pairs)]
    bound = -answers.score(scorer, questions, EOS, greedy=False)[0]
    n_tokens = sum(len(answer) for _, answer in pairs)

    # the loss of many steps, each of all rows 64 times
    losses = []
    for step in range(1 if name == "ar" else 40):
        ids = np.tile(np.arange(sequences.n), 64)
        batch, _ = batch_of(name, sequences, ids, first=step * len(ids))
        with torch.no_grad():
            losses.append(float(Objective(model, False)(to_tensors(batch))["loss"]))
    mean, error = np.mean(losses), np.std(losses) / np.sqrt(len(losses))
    expected = bound.sum() / n_tokens
    if name == "ar":
        assert np.isclose(mean, expected, rtol=1e-5)
    else:
        assert error < 0.02 * expected
        assert abs(mean - expected) < 4 * error + (0.01 * expected if name == "uniform" else 0)


@pytest.mark.parametrize("name", NETWORKS)
def test_micro_batches_add_up_to_the_step(name):
    """Rows with different numbers of answer tokens: the loss of one batch is the sum over its parts."""
    sequences = rows_of(make_pairs([(5, 6), (3, 4), (2, 3), (9, 12), (4, 1), (10, 2), (6, 9), (1, 1)]),
                        PairLayout(False, block=4 if name == "block" else 1))
    process, ids = process_of(name), np.arange(sequences.n)
    eligible = sequences.eligible(ids)
    levels = diffusion.noise_levels(process, 0, len(ids), n_eligible=data.count_by_block(process, eligible))
    cfg = train.Config(seq_len=LENGTH, objective=process.objective)

    def loss(rows):
        batch = data.read_batch(cfg, EOS, process, sequences, ids[rows], levels, rows, eligible[rows])
        with torch.no_grad():
            return float(Objective(NETWORKS[name], False)(to_tensors(batch))["loss"])

    parts = [loss(levels.microbatch_rows(part, 4)) for part in range(4)]
    assert np.isclose(sum(parts), loss(ids), rtol=1e-5) and min(parts) > 0
