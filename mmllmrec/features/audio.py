"""Sound: waves -> log-mel frames -> a small trainable transformer; or a vector an item, where that is all there is.

Legend: B batch, T samples of a wave, R frames, F mel bands, N tokens, D width.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllmrec.data.interactions import DataError
from mmllmrec.features.extractor import Extractor, source_name
from mmllmrec.features.signal import Standardise, transformer
from mmllmrec.runcard import content_hash

if TYPE_CHECKING:
    from mmllmrec.data.catalog import Catalog

FLOOR = 1e-6  # of the mel power under the logarithm: silence is log(1e-6), not -inf


class LogMel(nn.Module):
    """log(mel power + 1e-6), standardised per band: (B, T) float32 at ``rate`` hertz -> (B, R, F).

    Hann windows of ``window`` seconds every ``hop`` seconds, no padding at the ends, so R = 1 + (T - n) // h in
    samples; F = ``mels`` triangular HTK filters from ``low`` to ``high`` hertz (``high=None``: half the rate). The
    defaults suit a second of sound at 4000 Hz (38 frames); speech and music usually take 0.025 s, 0.010 s, 64 bands
    at 16,000 Hz. Nothing trains here and the standardisation starts as the identity: see ``fit``. Raises
    ``DataError`` for filters too narrow for the window and for waves that are shorter than it.
    """

    bank: Tensor
    hann: Tensor

    def __init__(
        self,
        rate: int,
        *,
        mels: int = 32,
        window: float = 0.064,
        hop: float = 0.025,
        low: float = 40.0,
        high: float | None = None,
    ):
        from transformers.audio_utils import mel_filter_bank

        super().__init__()
        self.rate, self.mels = rate, mels
        self.window, self.hop = round(window * rate), round(hop * rate)
        high = rate / 2 if high is None else high
        if self.window < 2 or self.hop < 1 or mels < 1 or not 0 <= low < high <= rate / 2:
            raise DataError(
                f"LogMel: window={window} s, hop={hop} s, mels={mels}, low={low}, high={high} hertz do not fit a rate "
                f"of {rate} hertz; bands end at half the rate"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a filter that is zero: an error here, below
            bank = mel_filter_bank(self.window // 2 + 1, mels, low, high, rate)
        if not bank.any(axis=0).all():
            raise DataError(
                f"LogMel: {mels} bands are too narrow for a window of {window} s; take fewer, or a longer window"
            )
        self.register_buffer("bank", torch.from_numpy(bank).float(), persistent=False)
        self.register_buffer("hann", torch.hann_window(self.window), persistent=False)
        self.standard = Standardise(mels)

    def frames(self, samples: int) -> int:
        """R of a wave of ``samples``."""
        if samples < self.window:
            raise DataError(f"LogMel: a wave of {samples} samples is shorter than a window of {self.window}")
        return 1 + (samples - self.window) // self.hop

    def fit(self, waves: Tensor, *, block: int = 256) -> Self:
        """Standardise each band over all frames of ``waves`` (B, T): give the train items that have sound."""
        self.standard.fit(torch.cat([self.raw(part) for part in waves.split(block)]))
        return self

    def raw(self, waves: Tensor) -> Tensor:
        """The log-mels before standardisation."""
        if waves.ndim != 2:
            raise DataError(f"LogMel: waves have shape {tuple(waves.shape)}; expected (B, T)")
        self.frames(waves.shape[1])
        with torch.autocast(waves.device.type, enabled=False):  # a spectrum's range is too wide for half precision
            found = torch.stft(
                waves.float(), self.window, self.hop, window=self.hann, center=False, return_complex=True
            )
            power = found.real.square() + found.imag.square()
            return (power.transpose(1, 2) @ self.bank + FLOOR).log()

    def forward(self, waves: Tensor) -> Tensor:
        x: Tensor = self.standard(self.raw(waves))
        return x


class AudioEncoder(nn.Module):
    """Raw waves through ``LogMel`` and a small transformer: (B, T) -> pooled (B, D), tokens (B, N, D).

    Runs of frames, as long as it takes for at most ``tokens`` of them, become a token each by one linear map, a
    learned position is added, and pooled is the mean of the last layer's tokens (the patches of Gong et al. 2021,
    *AST*, over time alone; pre-norm; no class token). ``rate`` is in hertz, ``samples`` the one length T it takes,
    ``mel`` are ``LogMel``'s settings. Rows are items that have sound: leave the absent ones out. Raises ``DataError``
    for waves of another length.

    >>> hear = AudioEncoder(4000, samples=4000)
    >>> pooled, tokens = hear(torch.zeros(2, 4000))
    >>> pooled.shape, tokens.shape
    (torch.Size([2, 64]), torch.Size([2, 10, 64]))
    """

    def __init__(
        self,
        rate: int,
        *,
        samples: int,
        dim: int = 64,
        layers: int = 2,
        heads: int = 4,
        tokens: int = 12,
        mel: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.mel = LogMel(rate, **(mel or {}))
        frames = self.mel.frames(samples)
        if tokens < 1:
            raise DataError(f"AudioEncoder: tokens={tokens}; at least 1")
        self.samples, self.patch = samples, math.ceil(frames / tokens)
        self.tokens = math.ceil(frames / self.patch)
        self.pooled_width = self.token_width = dim
        self.embed = nn.Linear(self.patch * self.mel.mels, dim)
        self.positions = nn.Parameter(torch.randn(self.tokens, dim) * 0.02)
        self.layers = transformer(dim, layers=layers, heads=heads)

    @classmethod
    def fit(cls, waves: Tensor | np.ndarray, rate: int, **settings: Any) -> AudioEncoder:
        """An encoder for waves like these, (B, T), its log-mels standardised on them: give the train items that have
        sound. Only the standardisation is fitted; the weights are random."""
        waves = torch.as_tensor(waves)
        encoder = cls(rate, samples=waves.shape[1], **settings)
        encoder.mel.fit(waves)
        return encoder

    def forward(self, waves: Tensor) -> tuple[Tensor, Tensor]:
        if waves.ndim != 2 or waves.shape[1] != self.samples:
            raise DataError(f"AudioEncoder: waves have shape {tuple(waves.shape)}; expected (B, {self.samples})")
        frames = self.mel(waves)
        # the last run is filled up with the mean, which is 0 here
        frames = F.pad(frames, (0, 0, 0, self.tokens * self.patch - frames.shape[1]))
        x = self.embed(frames.reshape(len(frames), self.tokens, -1)) + self.positions
        x = self.layers(x)
        return x.mean(dim=1), x


class FeatureEncoder(nn.Module):
    """Where a modality is a vector an item and nothing rawer: (B, F) -> pooled (B, D), and it as one token (B, 1, D).

    Standardised columns through a perceptron of one hidden layer, with a norm at the end. Rows are items that have
    the modality. Raises ``DataError`` for another width.
    """

    def __init__(self, width_in: int, dim: int = 64):
        super().__init__()
        self.pooled_width = self.token_width = dim
        self.tokens = 1
        self.standard = Standardise(width_in)
        self.layers = nn.Sequential(nn.Linear(width_in, dim), nn.GELU(), nn.Linear(dim, dim), nn.LayerNorm(dim))

    @classmethod
    def fit(cls, rows: Tensor | np.ndarray, dim: int = 64) -> FeatureEncoder:
        """An encoder for rows like these, (B, F), standardised on them: give the train items that have them."""
        rows = torch.as_tensor(rows)
        encoder = cls(rows.shape[1], dim)
        encoder.standard.fit(rows)
        return encoder

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        if rows.ndim != 2 or rows.shape[1] != len(self.standard.mean):
            raise DataError(f"FeatureEncoder: rows {tuple(rows.shape)}; expected (B, {len(self.standard.mean)})")
        pooled: Tensor = self.layers(self.standard(rows))
        return pooled, pooled[:, None]


def audio_extractor(source: str, rate: int, *, device: str = "cpu") -> Extractor:
    """A frozen ``transformers`` audio model (Whisper's encoder, AST, wav2vec 2.0 and their like) over raw waves.

    ``source`` is a folder or hub id, ``rate`` the catalogue's, in hertz; waves are resampled to the rate that the
    model's feature extractor asks for. Pooled is the mean over the states that cover sound, as far as the feature
    extractor says where the padding begins (Whisper's does, AST's does not). Raises ``DataError`` for what cannot be
    loaded and for a catalogue whose audio is a vector an item and no wave.
    """
    from math import gcd

    from scipy.signal import resample_poly
    from transformers import AutoFeatureExtractor

    from mmllmrec.features.towers import load_transformer, still, weights_hash

    model = load_transformer(source, what="audio model")
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    model.to(device)
    try:
        prepare: Any = AutoFeatureExtractor.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise DataError(f"audio model {source!r}: its preprocessor_config.json cannot be loaded: {error}") from error
    wanted = int(prepare.sampling_rate)
    settings = {"preprocessing": prepare.to_dict(), "rate": rate}

    def encode(waves: list[Any], names: list[str], tokens: bool) -> tuple[np.ndarray, list[np.ndarray]]:
        common = gcd(wanted, rate)
        heard = [resample_poly(w, wanted // common, rate // common).astype(np.float32) for w in waves]
        found = prepare(heard, sampling_rate=wanted, return_tensors="pt", return_attention_mask=True)
        with still(model):
            states = model(found[model.main_input_name].to(device)).last_hidden_state.float().cpu()
        mask = found.get("attention_mask", torch.ones(len(states), 1))
        # the mask is over frames or samples, of which a state covers a run
        lengths = (mask.sum(1) * states.shape[1] / mask.shape[1]).ceil().long().tolist()
        rows = [s[:n].numpy() for s, n in zip(states, lengths, strict=True)]
        return np.stack([r.mean(axis=0) for r in rows]), rows if tokens else []

    hashed = content_hash("audio", weights_hash(model), settings)
    return Extractor(source_name(source, "mean"), "audio", hashed, _waves, encode, settings)


def _waves(catalog: Catalog) -> Callable[[int], np.ndarray]:
    if "audio" not in catalog.dataset.column_names:
        raise DataError(f"{catalog.name}: its audio is a vector an item, not a wave; use FeatureTable.from_catalog")
    waves = catalog.signal("audio")
    return lambda item: waves[item]
