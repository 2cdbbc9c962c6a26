"""The KV cache: one network with and without it, and what decoding with a stale one costs."""

import pytest
import torch
from networks import AR, EOS, LINEAR, MASK, MASKED

from model import KVCache
from sampling import decode
from sampling.decode import DecodeConfig
from sampling.predictor import CacheProbe


@pytest.mark.parametrize("causal", (False, True))
def test_a_cached_window_equals_a_full_pass_where_nothing_else_changed(causal):
    """Store a full pass, then compute a window of the same tokens: the same hidden states.

    If a token of the window has changed, a causal network's are still the same; a bidirectional network's
    earlier positions would have changed, too.
    """
    model, g = (AR if causal else MASKED), torch.Generator().manual_seed(0)
    z = torch.randint(0, 40, (3, 20), generator=g)
    is_token = torch.ones(3, 20, dtype=torch.bool)
    is_token[1, :6] = False
    positions = (is_token.long().cumsum(1) - 1).clamp_min(0)
    documents = torch.where(is_token, 0, -1).int()
    cache, all_columns = KVCache(model.config, 3, 20, "cpu"), torch.arange(20).expand(3, -1)

    def window(first, last):
        columns = torch.arange(first, last).expand(3, -1)
        ids, at = z.gather(1, columns), positions.gather(1, columns)
        return model.forward_cached(ids, cache, columns, positions=at, is_token=is_token)

    full = model(z, documents=documents, positions=positions)
    cached = model.forward_cached(z, cache, all_columns, positions=positions, is_token=is_token)
    torch.testing.assert_close(cached[is_token], full[is_token], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(window(8, 15), full[:, 8:15], atol=1e-5, rtol=1e-4)
    z[:, 12] = 17
    changed = model(z, documents=documents, positions=positions)
    assert torch.allclose(window(12, 20), changed[:, 12:], atol=1e-5, rtol=1e-4) == causal


def test_a_pass_stores_only_what_it_is_asked_to():
    """Columns that are not to be stored are computed, and leave the cache as it was."""
    model = MASKED
    z, cache = torch.randint(0, 40, (2, 12)), KVCache(model.config, 2, 12, "cpu")
    model.forward_cached(z, cache, torch.arange(12).expand(2, -1))
    before = cache.keys.clone()
    columns = torch.arange(4, 8).expand(2, -1)
    is_stored = torch.tensor([[True, False, True, False]] * 2)
    model.forward_cached(torch.full((2, 4), 3), cache, columns, is_stored)
    has_changed = (cache.keys != before).any(-1).any(2).any(0)[:, :12]  # (B, L)
    assert has_changed.nonzero()[:, 1].tolist() == [4, 6] * 2


@pytest.mark.parametrize("cache", ("prefix", "dual"))
@pytest.mark.parametrize("order", ("ancestral", "low_confidence", "threshold"))
def test_a_cache_that_is_always_renewed_changes_nothing(cache, order):
    rows = [[1, 2, 3] + [MASK] * 30, [MASK] * 20]

    def generate(**settings):
        cfg = DecodeConfig(order=order, block=7, steps=0, threshold=0.3)._replace(**settings)
        return decode.generate(MASKED, rows, cfg, EOS, LINEAR)

    exact, renewed = generate(), generate(cache=cache, refresh=1)
    assert renewed.rows == exact.rows and renewed.cache_gap() is None
    stale = generate(cache=cache).cache_gap()
    assert stale.kl > 0 and stale.positions > 0
    fresher = generate(cache=cache, refresh=2).cache_gap()
    assert fresher.kl < stale.kl or order != "low_confidence"  # the others look at few positions


def test_a_probe_keeps_passes_that_are_evenly_spread():
    probe = CacheProbe(row=1)
    for number in range(100):
        probe.add(torch.full((2, 3), number), torch.zeros(number % 2), torch.zeros(1))  # every other: empty
    kept = [int(z[0, 0]) for z, _, _ in probe.records]
    assert kept == list(range(1, 100, 4)) and probe.n_seen == 50
