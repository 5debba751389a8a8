"""What presence does to a gate: weight, influence and gradient of an absent vector are exactly zero."""

import pytest
import torch

from mmllmrec import fusion
from mmllmrec.data.interactions import DataError

B, M, D = 7, 3, 5


@pytest.fixture
def case():
    torch.manual_seed(0)
    gate = fusion.Gate(D, M).double()
    torch.nn.init.normal_(gate.linear.weight)
    torch.nn.init.normal_(gate.linear.bias)
    vectors = torch.randn(B, M, D, dtype=torch.float64, requires_grad=True)
    present = torch.rand(B, M) < 0.6
    present[0], present[1] = False, True
    return gate, vectors, present


def test_gate_is_its_formula(case):
    gate, vectors, present = case
    fused, weights = gate(vectors, present)
    w, bias = gate.linear.weight, gate.linear.bias
    for b in range(B):
        seen = torch.cat([vectors[b, m] if present[b, m] else torch.zeros(D).double() for m in range(M)])
        raw = [torch.exp(w[m] @ seen + bias[m]) if present[b, m] else torch.zeros(()).double() for m in range(M)]
        total = sum(raw) if present[b].any() else 1.0
        torch.testing.assert_close(weights[b], torch.stack([r / total for r in raw]))
        torch.testing.assert_close(fused[b], sum(r / total * v for r, v in zip(raw, vectors[b], strict=True)))


def test_absent_weight_and_gradient_are_exactly_zero_and_the_rest_sums_to_one(case):
    gate, vectors, present = case
    fused, weights = gate(vectors, present)
    (gradient,) = torch.autograd.grad((fused**3).sum(), vectors)
    assert (weights[~present] == 0).all() and (gradient[~present] == 0).all()
    assert (gradient[present].abs().sum(-1) > 0).all()
    torch.testing.assert_close(weights.sum(1), present.any(1).double())


def test_what_an_absent_vector_holds_does_not_matter(case):
    gate, vectors, present = case
    spoiled = vectors.detach().masked_fill(~present[..., None], float("nan"))
    assert torch.equal(gate(spoiled, present)[0], gate(vectors, present)[0])
    assert torch.equal(fusion.mean(spoiled, present), fusion.mean(vectors, present))


def test_a_row_without_any_is_exactly_zero_with_finite_gradients(case):
    gate, vectors, present = case
    present = torch.zeros_like(present)
    with torch.autograd.detect_anomaly(check_nan=True):  # no NaN inside the backward either
        fused, weights = gate(vectors, present)
        gradients = torch.autograd.grad(fused.sum(), [vectors, *gate.parameters()])
    assert (fused == 0).all() and (weights == 0).all() and (fusion.mean(vectors, present) == 0).all()
    assert all((g == 0).all() for g in gradients)


def test_a_new_gate_is_the_mean_of_what_is_present(case):
    _, vectors, present = case
    gate = fusion.Gate(D, M).double()
    torch.testing.assert_close(gate(vectors, present)[0], fusion.mean(vectors, present))


def test_mean_is_over_the_present(case):
    _, vectors, present = case
    result = fusion.mean(vectors, present)
    for b in range(1, B):
        rows = vectors[b][present[b]]
        torch.testing.assert_close(result[b], rows.mean(0) if len(rows) else torch.zeros(D).double())


def test_other_shapes_are_refused(case):
    gate, vectors, present = case
    with pytest.raises(DataError, match="bool"):
        gate(vectors, present.long())
    with pytest.raises(DataError, match="expected"):
        gate(vectors[:, :2], present[:, :2])


@pytest.fixture(params=list(fusion.FUSIONS))
def fuse(request):
    torch.manual_seed(1)
    module = fusion.FUSIONS[request.param](D, M).double()
    for p in module.parameters():
        torch.nn.init.normal_(p)
    return module


def test_presence_masks_every_method(fuse, case):
    _, vectors, present = case
    fused, weights = fuse(vectors, present)
    assert fused.shape == (B, D) and weights.shape == (B, M) and (weights[~present] == 0).all()
    (gradient,) = torch.autograd.grad((fused**3).sum(), vectors)
    assert (gradient[~present] == 0).all()
    assert torch.equal(fuse(vectors.detach().masked_fill(~present[..., None], float("nan")), present)[0], fused)
    fused, weights = fuse(vectors, torch.zeros_like(present))
    assert (fused == 0).all() and (weights == 0).all()
    gradients = torch.autograd.grad(fused.sum(), [vectors, *fuse.parameters()], allow_unused=True)
    assert all(g is None or (g == 0).all() for g in gradients)
    with pytest.raises(DataError, match="bool"):
        fuse(vectors, present.long())


def test_sum_and_max_are_of_the_present(case):
    _, vectors, present = case
    total, _ = fusion.Sum(D, M)(vectors, present)
    best, weights = fusion.Max(D, M)(vectors, present)
    for b in range(1, B):
        rows = vectors[b][present[b]]
        if len(rows):
            torch.testing.assert_close(total[b], rows.sum(0))
            torch.testing.assert_close(best[b], rows.amax(0))
            assert weights[b].sum() == pytest.approx(1)


def test_attention_is_its_formula(case):
    _, vectors, present = case
    torch.manual_seed(2)
    module = fusion.Attentive(D, M).double()
    torch.nn.init.normal_(module.kind)
    fused, weights = module(vectors, present)
    w, bias, a = module.linear.weight, module.linear.bias, module.score.weight[0]
    for b in range(B):
        raw = [
            torch.exp(a @ torch.tanh(w @ vectors[b, m] + bias + module.kind[m]))
            if present[b, m]
            else vectors.new_zeros(())
            for m in range(M)
        ]
        total = sum(raw) if present[b].any() else 1.0
        torch.testing.assert_close(weights[b], torch.stack([r / total for r in raw]))
        torch.testing.assert_close(fused[b], sum(r / total * v for r, v in zip(raw, vectors[b], strict=True)))


def test_concat_is_its_formula(case):
    _, vectors, present = case
    torch.manual_seed(2)
    module = fusion.Concat(D, M).double()
    fused, weights = module(vectors, present)
    w, bias = module.linear.weight, module.linear.bias
    for b in range(B):
        expected = torch.zeros(D).double()
        if present[b].any():
            expected = bias
            for m in range(M):
                if present[b, m]:
                    expected = expected + w[:, m * D : (m + 1) * D] @ vectors[b, m] + w[:, M * D + m]
        torch.testing.assert_close(fused[b], expected)
        torch.testing.assert_close(weights[b], present[b] / present[b].sum().clamp(min=1))


def test_experts_are_their_formula_and_the_others_get_no_gradient(case):
    _, vectors, present = case
    torch.manual_seed(2)
    module = fusion.Experts(D, M, experts=3, top=1).double()
    fused, _ = module(vectors, present)
    flat = vectors.detach().masked_fill(~present[..., None], 0.0).flatten(1)
    x = torch.cat([flat, present.double()], 1)
    best = module.gate(x).argmax(1)
    for b in range(1, B):
        expected = module.experts[int(best[b])](x[b]) * present[b].any()
        torch.testing.assert_close(fused[b], expected)
    used = {int(best[b]) for b in range(B) if present[b].any()}
    fused.sum().backward()
    assert {e for e, expert in enumerate(module.experts) if expert.weight.grad.abs().sum() > 0} == used
    with pytest.raises(DataError, match="top=4"):
        fusion.Experts(D, M, experts=3, top=4)


def test_the_heuristic_trusts_the_id_of_an_item_with_events():
    vectors = torch.eye(3).expand(4, 3, 3)
    present = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 0, 0]], dtype=torch.bool)
    fused, weights = fusion.Heuristic(3, 3, half=10.0)(vectors, present, torch.tensor([30.0, 0.0, 5.0, 0.0]))
    expected = torch.tensor([[0.75, 0.125, 0.125], [0.0, 1.0, 0.0], [0.0, 0.5, 0.5], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(fused, expected)
