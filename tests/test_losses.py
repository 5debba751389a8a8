"""Losses against naive loops, in value and gradient, and what their masks do."""

import math

import pytest
import torch

from mmllmrec import losses
from mmllmrec.data.interactions import DataError

B, K, C, D = 7, 3, 11, 5


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def same(loss, naive, *inputs):
    """Equal value and equal gradient in each input."""
    torch.testing.assert_close(loss, naive)
    for x, y in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(naive, inputs, retain_graph=True), strict=True
    ):
        torch.testing.assert_close(x, y)


def test_bpr_is_its_formula():
    positive, negative = normal(B, seed=1), normal(B, K, seed=2)
    naive = 0.0
    for b in range(B):
        for k in range(K):
            naive = naive - torch.log(1 / (1 + torch.exp(negative[b, k] - positive[b]))) / (B * K)
    same(losses.bpr(positive, negative), naive, positive, negative)


def test_bpr_stays_finite_for_hopeless_scores():
    positive = torch.full((1,), -1e4, requires_grad=True)
    loss = losses.bpr(positive, torch.full((1, 1), 1e4))
    loss.backward()
    assert loss.item() == 2e4 and positive.grad.item() == -1.0


def test_bpr_refuses_one_negative_without_its_dimension():
    with pytest.raises(DataError, match=r"\(B, K\)"):
        losses.bpr(torch.zeros(3), torch.zeros(3))


def test_l2_and_embedding_norm_are_their_formulas():
    u, i, j = normal(B, D, seed=1), normal(B, D, seed=2), normal(B, K, D, seed=3)
    squares = [sum(v**2 for v in e.reshape(-1)) for e in (u, i, j)]
    same(losses.l2(u, i, j), sum(squares) / (2 * B), u, i, j)
    same(losses.embedding_norm(u, i, j), sum(s**0.5 for s in squares) / B, u, i, j)


def test_l2_of_a_batch_is_the_mean_over_its_halves_and_the_norm_is_not():
    x = normal(6, D)
    assert torch.isclose((losses.l2(x[:3]) + losses.l2(x[3:])) / 2, losses.l2(x))
    assert (losses.embedding_norm(x[:3]) + losses.embedding_norm(x[3:])) / 2 > 1.3 * losses.embedding_norm(x)


def test_embedding_norm_has_no_nan_gradient_at_zero():
    x = torch.zeros(3, 2, requires_grad=True)
    losses.embedding_norm(x).backward()
    assert x.grad.abs().max() == 0


def softmax_case():
    generator = torch.Generator().manual_seed(5)
    users, items, log_q = normal(B, D, seed=1), normal(C, D, seed=2), normal(C, seed=3)
    target = torch.randint(0, C, (B,), generator=generator)
    mask = torch.rand(B, C, generator=generator) < 0.3
    mask[torch.arange(B), target] = torch.arange(B) % 2 == 0  # the target is named in some rows: it must stay
    return users, items, log_q, target, mask


def test_sampled_softmax_is_its_formula():
    users, items, log_q, target, mask = softmax_case()
    naive = 0.0
    for b in range(B):
        logits = [users[b] @ items[c] / 0.3 - log_q[c] for c in range(C)]
        below = sum(torch.exp(logits[c]) for c in range(C) if c == target[b] or not mask[b, c])
        naive = naive - (logits[target[b]] - torch.log(below)) / B
    loss = losses.sampled_softmax(users, items, target, log_q=log_q, mask=mask, temperature=0.3)
    same(loss, naive, users, items, log_q)


def test_sampled_softmax_by_distinct_users_is_a_row_an_event():
    users, items, log_q, target, _ = softmax_case()
    rows = torch.tensor([2, 0, 2, 1, 0, 2, 2, 1])[torch.arange(B) % 8]
    mask = torch.zeros(B, C, dtype=torch.bool)
    for r in rows.unique():
        mask[r, target[rows == r]] = True  # a user's positives, as a batch's mask names them
    mask[0, next(c for c in range(C) if not mask[0, c])] = True
    whole = losses.sampled_softmax(users[rows], items, target, log_q=log_q, mask=mask[rows], temperature=0.3)
    given = {"log_q": log_q, "rows": rows, "temperature": 0.3}
    short = losses.sampled_softmax(users, items, target, mask=mask, **given)
    same(short, whole, users, items, log_q)
    mask[rows, target] = False  # they are masked for each other without being named
    assert torch.equal(losses.sampled_softmax(users, items, target, mask=mask, **given), short)


def test_a_user_whose_candidates_are_all_masked_costs_nothing():
    users, items, _, target, _ = softmax_case()
    everything, rows = torch.ones(B, C, dtype=torch.bool), torch.zeros(B, dtype=torch.int64)
    loss = losses.sampled_softmax(users, items, target, mask=everything, rows=rows)
    assert loss.item() == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, (users, items)))


def test_a_masked_candidate_has_exactly_no_gradient_and_no_influence():
    users, items, log_q, target, _ = softmax_case()
    gone = next(c for c in range(C) if c not in target)
    mask = torch.zeros(B, C, dtype=torch.bool)
    mask[:, gone] = True
    loss = losses.sampled_softmax(users, items, target, log_q=log_q, mask=mask)
    (gradient,) = torch.autograd.grad(loss, items)
    assert (gradient[gone] == 0).all() and (gradient[target] != 0).any()
    other = items.detach().clone()
    other[gone] = 1e6
    assert losses.sampled_softmax(users, other, target, log_q=log_q, mask=mask) == loss


def test_a_mask_of_another_shape_is_refused():
    users, items, _, target, _ = softmax_case()
    with pytest.raises(DataError, match=r"mask \(1, 11\); expected a row a user"):
        losses.sampled_softmax(users, items, target, mask=torch.ones(1, C, dtype=torch.bool), rows=target * 0)


def test_a_row_whose_others_are_all_masked_costs_nothing():
    users, items, _, target, _ = softmax_case()
    loss = losses.sampled_softmax(users, items, target, mask=torch.ones(B, C, dtype=torch.bool))
    assert loss.item() == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, (users, items)))
    # a finite mask value would be the largest logit here
    low = losses.sampled_softmax(
        -1e9 * torch.ones(1, D), torch.ones(2, D), torch.tensor([0]), mask=torch.ones(1, 2) > 0
    )
    assert low.item() == 0


def test_uniform_scores_cost_log_candidates():
    users, items, _, target, _ = softmax_case()
    loss = losses.sampled_softmax(torch.zeros_like(users), items, target, log_q=torch.full((C,), -2.0))
    assert math.isclose(loss.item(), math.log(C), rel_tol=1e-9)
    same_rows = torch.ones(B, D)
    assert math.isclose(losses.info_nce(same_rows, same_rows).item(), math.log(B), rel_tol=1e-6)


def test_log_q_lifts_rare_candidates():
    """A popular candidate (large log_q) is discounted: the loss of a popular positive is larger than a rare one's."""
    users, items = torch.zeros(1, D), torch.zeros(2, D)
    log_q = torch.tensor([0.9, 0.1]).log()
    popular, rare = (losses.sampled_softmax(users, items, torch.tensor([t]), log_q=log_q).item() for t in (0, 1))
    assert math.isclose(popular, -math.log(0.1), rel_tol=1e-5) and math.isclose(rare, -math.log(0.9), rel_tol=1e-5)


def test_temperature_is_learnable():
    users, items, _, target, _ = softmax_case()
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    loss = losses.sampled_softmax(users, items, target, temperature=temperature)
    assert torch.autograd.grad(loss, temperature)[0] != 0


def test_info_nce_is_its_formula_and_symmetrical():
    a, b = normal(B, D, seed=1), normal(B, D, seed=2)
    cos = [[a[n] @ b[m] / (a[n] @ a[n]).sqrt() / (b[m] @ b[m]).sqrt() / 0.2 for m in range(B)] for n in range(B)]
    naive = 0.0
    for n in range(B):
        row = torch.log(sum(torch.exp(cos[n][m]) for m in range(B)))
        column = torch.log(sum(torch.exp(cos[m][n]) for m in range(B)))
        naive = naive + (row + column - 2 * cos[n][n]) / (2 * B)
    same(losses.info_nce(a, b, temperature=0.2), naive, a, b)
    torch.testing.assert_close(losses.info_nce(a, b), losses.info_nce(b, a))


def test_half_precision_scores_are_summed_in_float32():
    loss = losses.sampled_softmax(torch.zeros(1, D).bfloat16(), torch.zeros(300, D).bfloat16(), torch.tensor([0]))
    assert loss.dtype == torch.float32 and math.isclose(loss.item(), math.log(300), rel_tol=1e-6)


@pytest.mark.parametrize("name", ["bce", "mse", "hinge", "adaptive_hinge"])
def test_pointwise_and_pairwise_losses_are_their_formulas(name):
    positive, negative = normal(B, seed=1), normal(B, K, seed=2)
    no, yes = [[negative[b, k] for k in range(K)] for b in range(B)], [positive[b] for b in range(B)]
    flat = [v for row in no for v in row]
    zero = torch.zeros((), dtype=torch.float64)
    naive = {
        "bce": lambda: (
            (sum(torch.log1p(torch.exp(-v)) for v in yes) + sum(torch.log1p(torch.exp(v)) for v in flat)) / (B + B * K)
        ),
        "mse": lambda: (sum((v - 1) ** 2 for v in yes) + sum(v**2 for v in flat)) / (B + B * K),
        "hinge": lambda: sum(torch.maximum(zero, 1 - yes[b] + v) for b in range(B) for v in no[b]) / (B * K),
        "adaptive_hinge": lambda: sum(torch.maximum(zero, 1 - yes[b] + max(no[b])) for b in range(B)) / B,
    }[name]()
    same(getattr(losses, name)(positive, negative), naive, positive, negative)


def test_adaptive_hinge_moves_the_hardest_negative_alone():
    negative = torch.tensor([[0.1, 0.9, -3.0]], requires_grad=True)
    losses.adaptive_hinge(torch.zeros(1), negative).backward()
    assert negative.grad.tolist() == [[0.0, 1.0, 0.0]]


def test_full_softmax_over_the_catalogue_is_the_sampled_one_with_every_item_a_candidate():
    users, items, _, target, mask = softmax_case()
    scores = users @ items.T
    same(losses.softmax(scores, target, mask=mask), losses.sampled_softmax(users, items, target, mask=mask), users)
    with pytest.raises(DataError, match=r"\(B, C\)"):
        losses.softmax(scores, target[:3])


def unit_rows(x):
    return [row / (row @ row).sqrt() for row in x]


def test_the_softmax_of_factors_is_that_of_their_product(monkeypatch):
    monkeypatch.setattr(losses.supervised, "BLOCK", 30)  # two rows and a rest of one at a time
    torch.manual_seed(0)
    queries, candidates = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (7, 11))
    target = torch.tensor([3, 0, 10, 3, 5, 1, 3])
    value = losses.matched_softmax(queries * 40, candidates, target)  # scores far apart
    found = torch.autograd.grad(3 * value, (queries, candidates))
    plain = losses.softmax(40 * queries @ candidates.T, target)
    wanted = torch.autograd.grad(3 * plain, (queries, candidates))
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(found, wanted)
    with pytest.raises(DataError, match="matched_softmax: queries"):
        losses.matched_softmax(queries, candidates[:, :4], target)


def test_bootstrap_and_reconstruction_are_their_formulas_and_the_target_is_still():
    online, target = normal(B, D, seed=1), normal(B, D, seed=2)
    cosines = [a @ b for a, b in zip(unit_rows(online), unit_rows(target.detach()), strict=True)]
    same(losses.bootstrap(online, target), sum(1 - c for c in cosines) / B, online)
    same(losses.reconstruction(online, target, power=2.0), sum((1 - c) ** 2 for c in cosines) / B, online)
    for loss in (losses.bootstrap(online, target), losses.reconstruction(online, target)):
        assert torch.autograd.grad(loss, target, allow_unused=True)[0] is None


def test_alignment_and_uniformity_are_their_formulas():
    a, b = normal(B, D, seed=1), normal(B, D, seed=2)
    one, two = unit_rows(a), unit_rows(b)
    same(losses.alignment(a, b), sum(((x - y) ** 2).sum() for x, y in zip(one, two, strict=True)) / B, a, b)
    pairs = [torch.exp(-2 * ((one[n] - one[m]) ** 2).sum()) for n in range(B) for m in range(n)]
    same(losses.uniformity(a), torch.log(sum(pairs) / len(pairs)), a)
    line = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    assert losses.uniformity(line).item() == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(DataError, match="2 or more"):
        losses.uniformity(line[:1])


def test_info_nce_one_way_reads_rows_alone():
    a, b = normal(B, D, seed=1), normal(B, D, seed=2)
    one, other = losses.info_nce(a, b, both_ways=False), losses.info_nce(b, a, both_ways=False)
    torch.testing.assert_close((one + other) / 2, losses.info_nce(a, b))
    assert abs(one - other) > 1e-3


def test_info_nce_within_has_the_views_own_rows_among_its_negatives():
    a, b = normal(B, D, seed=1), normal(B, D, seed=2)
    one, two, t = unit_rows(a), unit_rows(b), 0.3
    total = 0.0
    for n in range(B):
        others = [torch.exp(one[n] @ x / t) for x in two] + [torch.exp(one[n] @ one[m] / t) for m in range(B) if m != n]
        total = total + torch.stack(others).sum().log() - one[n] @ two[n] / t
    same(losses.info_nce(a, b, temperature=t, both_ways=False, within=True), total / B, a, b)
    other = losses.info_nce(b, a, temperature=t, both_ways=False, within=True)
    torch.testing.assert_close(losses.info_nce(a, b, temperature=t, within=True), (total / B + other) / 2)


def test_reconstruction_of_parallel_rows_is_finite_at_any_power():
    rows = normal(200, D, seed=1)
    value = losses.reconstruction(rows, rows.detach() * 3, power=1.5)
    assert torch.isfinite(value) and torch.isfinite(torch.autograd.grad(value, rows)[0]).all()
    with pytest.raises(DataError, match=r"power=0\.5"):
        losses.reconstruction(rows, rows, power=0.5)
