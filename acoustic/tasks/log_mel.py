"""The floor that a representation has to beat: log-mel bands, which nobody trained."""

import numpy as np
import torch
import torchaudio

RATE, BANDS, WINDOW, HOP = 16_000, 64, 400, 160


class LogMel:
    """In the place of an `embeddings.Encoder`: one layer of 64 bands, 100 frames a second; audio has variance 1."""

    rate, num_layers, frame_seconds = RATE, 1, HOP / RATE

    def __init__(self):
        self.mel = torchaudio.transforms.MelSpectrogram(RATE, n_fft=WINDOW, hop_length=HOP, n_mels=BANDS)

    @torch.no_grad()
    def layers(self, waveforms: list[np.ndarray]) -> list[torch.Tensor]:
        """(samples,) each -> (1, frames, bands) each."""
        scaled = [(waveform - waveform.mean()) / (waveform.std() + 1e-7) for waveform in waveforms]
        return [torch.log(self.mel(torch.from_numpy(waveform)) + 1e-6).T[None] for waveform in scaled]
