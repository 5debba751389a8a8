"""Sensors: missing channels leave no trace, order means nothing, and scents can be told apart."""

import numpy as np
import pytest
import torch

from mmllmrec.data.atelier.sense import CHANNELS, SCENTS, scents
from mmllmrec.data.interactions import DataError
from mmllmrec.features.sensor import Channel, SensorEncoder
from mmllmrec.seed import seed_everything
from tests.planted import probe

NAMES = [Channel("force", "N"), Channel("warmth", "K"), Channel("gloss"), Channel("slip"), Channel("hum", "Hz")]
NAN = float("nan")


@pytest.fixture
def readings():
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) * 10 + 300


@pytest.fixture
def encoder(readings):
    seed_everything(0)
    return SensorEncoder.fit(readings, NAMES, dim=16, heads=2)


@pytest.mark.parametrize("batch", [1, 7])
def test_shapes(encoder, readings, batch):
    pooled, tokens = encoder(readings[:batch])
    assert pooled.shape == (batch, encoder.pooled_width) == (batch, 16)
    assert tokens.shape == (batch, encoder.tokens, encoder.token_width) == (batch, 5, 16)


def test_one_by_one_is_the_batch_in_training_and_in_evaluation(encoder, readings):
    readings[2, 1] = readings[4] = NAN
    pooled, tokens = encoder(readings)
    for n in range(7):
        torch.testing.assert_close(encoder(readings[n : n + 1])[0][0], pooled[n], atol=1e-5, rtol=1e-4)
    with torch.no_grad():  # PyTorch takes a faster path here
        torch.testing.assert_close(encoder.eval()(readings)[1], tokens, atol=1e-5, rtol=1e-4)


def test_a_missing_channel_has_no_influence_and_no_gradient(encoder, readings):
    present = torch.ones(7, 5, dtype=torch.bool)
    present[:, 3] = False
    present[2, 0] = False
    expected = encoder(readings.masked_fill(~present, NAN))
    for value in (0.0, 1e6, float("inf"), NAN):
        given = readings.masked_fill(~present, value).requires_grad_()
        encoder.zero_grad()
        pooled, tokens = encoder(given, present)
        assert torch.equal(pooled, expected[0]) and torch.equal(tokens, expected[1])
        assert (tokens[~present] == 0).all()
        (pooled * torch.randn(pooled.shape)).sum().backward()
        assert (given.grad[~present] == 0).all() and (given.grad[present] != 0).all()
        assert (encoder.weight.grad[3] == 0).all() and (encoder.bias.grad[3] == 0).all()
        assert (encoder.weight.grad[[0, 1, 2, 4]].abs().sum(1) > 0).all()


def test_a_missing_channel_is_one_that_was_never_there(encoder, readings):
    """Naive oracle: an encoder of the other channels alone, with the same weights."""
    keep = [0, 2, 4]
    smaller = SensorEncoder([NAMES[c] for c in keep], dim=16, heads=2)
    state = encoder.state_dict()
    smaller.load_state_dict({k: v[keep] if k in OF_CHANNELS else v for k, v in state.items()})
    masked = readings.clone()
    masked[:, [1, 3]] = NAN
    torch.testing.assert_close(encoder(masked)[0], smaller(readings[:, keep])[0])


def test_a_row_without_any_channel_is_zero_and_harmless(encoder, readings):
    readings[3] = NAN
    given = readings.requires_grad_()
    pooled, tokens = encoder(given)
    assert (pooled[3] == 0).all() and (tokens[3] == 0).all() and pooled.isfinite().all()
    pooled.square().sum().backward()
    assert (given.grad[3] == 0).all()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


OF_CHANNELS = ("weight", "bias", "standard.mean", "standard.scale")


def test_the_order_of_the_channels_means_nothing(encoder, readings):
    order = [4, 2, 0, 1, 3]
    other = SensorEncoder([NAMES[c] for c in order], dim=16, heads=2)
    other.load_state_dict({k: v[order] if k in OF_CHANNELS else v for k, v in encoder.state_dict().items()})
    pooled, tokens = other(readings[:, order])
    expected = encoder(readings)
    torch.testing.assert_close(pooled, expected[0])
    torch.testing.assert_close(tokens, expected[1][:, order])
    swapped = encoder(readings[:, order])[0]
    assert (swapped - expected[0]).abs().max() > 0.1  # the columns alone, without their names, are another reading


def test_align_goes_by_name(encoder, readings):
    order = [4, 2, 0]
    found = encoder.align(readings[:, order], [NAMES[c] for c in order])
    assert torch.equal(found[:, order], readings[:, order]) and found[:, [1, 3]].isnan().all()
    with pytest.raises(DataError, match="'K' first"):
        encoder.align(readings, [Channel(c.name, "°C" if c.unit == "K" else c.unit) for c in NAMES])
    with pytest.raises(DataError, match="unknown"):
        encoder.align(readings[:, :1], [Channel("taste")])


def test_standardisation_leaves_missing_and_constant_readings_out():
    rows = torch.tensor([[1.0, 5.0, NAN], [3.0, 5.0, NAN], [NAN, 5.0, NAN]])
    standard = SensorEncoder.fit(rows, dim=8, heads=2).standard
    assert standard.mean.tolist() == [2.0, 5.0, 0.0] and standard.scale.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("out", [0, 1])
def test_a_gradient_reaches_every_parameter(encoder, readings, out):
    readings[2, 1] = NAN
    found = encoder(readings)[out]
    (found * torch.randn(found.shape)).sum().backward()
    dead = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert dead == []


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_an_untrained_encoder_tells_the_scents_apart(missing):
    rng = np.random.default_rng(0)
    levels = rng.integers(0, SCENTS, 211)
    table = scents(levels, rng, nose=1)
    table[rng.random((211, CHANNELS)) < missing] = np.nan
    seed_everything(0)
    with torch.no_grad():
        pooled, _ = SensorEncoder.fit(table[:140])(torch.from_numpy(table))
    assert probe(pooled.numpy(), levels, train=140) > 0.8  # chance 0.25


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: SensorEncoder([]),
        lambda: SensorEncoder([Channel("a"), Channel("a", "N")]),
        lambda: SensorEncoder([Channel("a")], dim=10, heads=4),
        lambda: SensorEncoder([Channel("a")])(torch.zeros(3, 2)),
        lambda: SensorEncoder([Channel("a")])(torch.zeros(3, 1), torch.zeros(3, 2, dtype=torch.bool)),
        lambda: SensorEncoder([Channel("a")])(torch.zeros(3, 1), torch.zeros(3, 1)),
    ],
)
def test_what_does_not_fit_is_refused(wrong):
    with pytest.raises(DataError):
        wrong()
