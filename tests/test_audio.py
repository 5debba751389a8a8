"""Sound: what a log-mel says of a known tone, and what the small encoder keeps of Atelier's chimes."""

import math
import time

import numpy as np
import pytest
import torch

from mmllmrec.data.atelier.sense import CHIMES, RATE, chimes
from mmllmrec.data.interactions import DataError
from mmllmrec.features.audio import AudioEncoder, FeatureEncoder, LogMel
from mmllmrec.seed import seed_everything
from tests.planted import probe


def tone(hertz, rate=RATE, seconds=1.0):
    t = torch.arange(int(rate * seconds)) / rate
    return torch.sin(2 * math.pi * hertz * t)[None]


@pytest.fixture(scope="module")
def heard():
    rng = np.random.default_rng(0)
    levels = rng.integers(0, len(CHIMES), 211)
    return torch.from_numpy(chimes(levels, rng)), levels


def test_a_tone_is_loudest_in_the_band_around_it():
    mel = LogMel(RATE)
    to_mel = lambda hertz: 2595 * math.log10(1 + hertz / 700)  # noqa: E731 - HTK's formula
    centres = np.linspace(to_mel(40), to_mel(RATE / 2), 34)[1:-1]
    for hertz in (200.0, *CHIMES, 1500.0):
        loudest = mel.raw(tone(hertz)).mean(1).argmax().item()
        assert abs(loudest - np.abs(centres - to_mel(hertz)).argmin()) <= 1


def test_twice_the_amplitude_adds_log_4_and_silence_is_the_floor():
    mel = LogMel(RATE)
    once, twice = mel.raw(tone(440.0)), mel.raw(2 * tone(440.0))
    loud = once > 0
    torch.testing.assert_close((twice - once)[loud], torch.full_like(once[loud], math.log(4)), atol=1e-3, rtol=0)
    torch.testing.assert_close(mel.raw(torch.zeros(1, RATE)), torch.full((1, 38, 32), math.log(1e-6)))


def test_the_log_mel_is_that_of_transformers():
    from transformers.audio_utils import spectrogram

    mel, wave = LogMel(RATE), chimes(np.array([2]), np.random.default_rng(1))[0]
    window = torch.hann_window(256).numpy()
    options = {"frame_length": 256, "hop_length": 100, "center": False, "power": 2.0, "mel_floor": 1e-12}
    expected = spectrogram(wave, window, mel_filters=mel.bank.numpy(), **options).T
    np.testing.assert_allclose(mel.raw(torch.from_numpy(wave)[None])[0].exp() - 1e-6, expected, rtol=1e-3, atol=1e-4)


def test_standardised_bands_have_mean_0_and_variance_1(heard):
    waves, _ = heard
    frames = LogMel(RATE).fit(waves, block=50)(waves).flatten(0, 1)
    torch.testing.assert_close(frames.mean(0), torch.zeros(32), atol=1e-4, rtol=0)
    torch.testing.assert_close(frames.var(0, correction=0), torch.ones(32), atol=1e-3, rtol=0)


def test_a_fit_sees_only_what_it_is_given(heard):
    waves, _ = heard
    seed_everything(0)
    first = AudioEncoder.fit(waves[:50], RATE)
    assert torch.equal(first.mel.standard.mean, LogMel(RATE).fit(waves[:50]).standard.mean)
    assert not torch.equal(first.mel.standard.mean, LogMel(RATE).fit(waves).standard.mean)
    second = AudioEncoder(RATE, samples=RATE)  # a saved encoder carries its standardisation
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(first(waves[:3]), second(waves[:3]))


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize(("rate", "samples", "tokens"), [(4000, 4000, 10), (16000, 11 * 16000, 12), (4000, 256, 1)])
def test_shapes(batch, rate, samples, tokens):
    encoder = AudioEncoder(rate, samples=samples, dim=24, layers=1)
    pooled, found = encoder(torch.randn(batch, samples))
    assert pooled.shape == (batch, encoder.pooled_width) == (batch, 24)
    assert found.shape == (batch, encoder.tokens, encoder.token_width) == (batch, tokens, 24)


def test_one_by_one_is_the_batch_in_training_and_in_evaluation(heard):
    encoder, waves = AudioEncoder.fit(heard[0], RATE), heard[0][:5]
    pooled, tokens = encoder(waves)
    for n in range(5):
        torch.testing.assert_close(encoder(waves[n : n + 1])[0][0], pooled[n], atol=1e-5, rtol=1e-4)
    with torch.no_grad():  # PyTorch takes a faster path here
        torch.testing.assert_close(encoder.eval()(waves)[1], tokens, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("build", [lambda w: AudioEncoder.fit(w, RATE), lambda w: FeatureEncoder.fit(w, 64)])
@pytest.mark.parametrize("out", [0, 1])
def test_a_gradient_reaches_every_parameter(heard, build, out):
    waves = heard[0][:13]
    encoder = build(waves)
    found = encoder(waves)[out]
    (found * torch.randn(found.shape)).sum().backward()
    dead = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert dead == []


def test_an_untrained_encoder_tells_the_chimes_apart(heard):
    waves, levels = heard
    seed_everything(0)
    with torch.no_grad():
        pooled, tokens = AudioEncoder.fit(waves[:140], RATE)(waves)
    assert probe(pooled.numpy(), levels, train=140) > 0.9  # chance 0.25
    assert probe(tokens[:, -1].numpy(), levels, train=140) > 0.5  # and so does the faint end of the sound


def test_128_items_take_a_fraction_of_a_second(heard):
    encoder = AudioEncoder.fit(heard[0], RATE)
    waves = heard[0][:128]
    times = []
    for _ in range(4):
        began = time.perf_counter()
        encoder(waves)[0].square().mean().backward()
        times.append(time.perf_counter() - began)
    assert min(times) < 0.4  # twice the bound, for a busy machine


def test_a_feature_vector_is_one_token(heard):
    rows = torch.randn(17, 5) * 100 + 50
    rows[:, 2] = 3.0
    encoder = FeatureEncoder.fit(rows, 16)
    pooled, tokens = encoder(rows)
    assert pooled.shape == (17, 16) and torch.equal(tokens[:, 0], pooled)
    moved = rows.clone()
    moved[:, 2] = 1e6  # a column that was constant on the train items says nothing
    torch.testing.assert_close(encoder(moved)[0], pooled)
    scaled = FeatureEncoder.fit(rows * 1000, 16)
    scaled.layers.load_state_dict(encoder.layers.state_dict())
    torch.testing.assert_close(scaled(rows * 1000)[0], pooled, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: LogMel(4000, high=3000.0),
        lambda: LogMel(4000, mels=200),
        lambda: LogMel(4000, window=0.0),
        lambda: LogMel(4000)(torch.zeros(4000)),
        lambda: LogMel(4000)(torch.zeros(1, 100)),
        lambda: AudioEncoder(4000, samples=100),
        lambda: AudioEncoder(4000, samples=4000, heads=5),
        lambda: AudioEncoder(4000, samples=4000)(torch.zeros(1, 4100)),
        lambda: FeatureEncoder(5)(torch.zeros(1, 6)),
        lambda: FeatureEncoder.fit(torch.zeros(0, 6)),
    ],
)
def test_what_does_not_fit_is_refused(wrong):
    with pytest.raises(DataError):
        wrong()
