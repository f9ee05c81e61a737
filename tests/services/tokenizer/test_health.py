"""The probe of codebook and solver health: what it measures, when it runs, when it does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import numpy as np
import pytest

from scq.codec import FrameCodec
from scq.metrics import psnr_db
from support.tokenizerd import LABELLED, picture, tiny_model
from vqserve.common.metrics import ServerMetrics
from vqserve.tokenizer.health import HealthProbe
from vqserve.tokenizer.loading import serve
from vqserve.tokenizer.metrics import ScqMetrics
from vqserve.tokenizer.pipeline import EncodedPicture
from vqserve.tokenizer.probe import PROBED_LATENTS, probe

PIXELS = picture(128, 96)


def test_a_probe_tells_quality_and_the_exact_solution() -> None:
    codec = FrameCodec(tiny_model(LABELLED))
    encoded = codec.encode(PIXELS)
    sample = probe(codec, PIXELS, encoded)
    assert sample.psnr_db == pytest.approx(psnr_db(PIXELS, codec.decode(encoded.codes)))
    assert sample.iterations.shape == sample.kkt_residuals.shape == (PROBED_LATENTS,)
    assert (sample.support_sizes >= 1).all()
    assert (sample.kkt_residuals < 1e-6).all()
    # The lattice holds fewer points than the hull, but the exact solver also minds lambda.
    assert 0 <= sample.exact_error < 1.01 * sample.coded_error


def test_a_probe_of_a_delta_frame_sees_the_whole_picture() -> None:
    codec = FrameCodec(tiny_model(LABELLED))
    encoder, decoder = codec.frame_encoder(), codec.frame_decoder()
    decoder.decode(encoder.encode(PIXELS).codes)
    changed = PIXELS.copy()
    changed[:16, :16] = 0
    delta = encoder.encode(changed)
    assert delta.stats.frame_type == "delta"
    expected = psnr_db(changed, decoder.decode(delta.codes))
    assert probe(codec, changed, delta).psnr_db == pytest.approx(expected)


@dataclass
class Probed:
    """A probe of every second frame, and what it has put on the metrics."""

    health: HealthProbe
    server: ServerMetrics
    encoded: EncodedPicture

    def count(self, outcome: str) -> float:
        labels = {"model": "labelled", "version": self.encoded.model.card.model_hash[:8]}
        name = "scq_health_probes_total"
        return self.server.registry.get_sample_value(name, {**labels, "outcome": outcome}) or 0.0

    async def until(self, outcome: str, expected: float) -> None:
        async with asyncio.timeout(20):
            while self.count(outcome) != expected:
                await asyncio.sleep(0.01)


@pytest.fixture
async def probed() -> AsyncIterator[Probed]:
    server = ServerMetrics("health", "0")
    metrics = ScqMetrics(server.registry, 16)
    model = serve(tiny_model(LABELLED), 250_000)
    metrics.model_loaded(model.name, model.card.model_hash, model.card.num_codes)
    health = HealthProbe(metrics, every=2)
    encoded = EncodedPicture(model, PIXELS, model.codec.encode(PIXELS), 1000)
    yield Probed(health, server, encoded)
    await health.close()


async def test_one_frame_in_so_many_is_probed(probed: Probed) -> None:
    for _ in range(2):
        probed.health.consider(probed.encoded, is_busy=False)
    await probed.until("ok", 1)
    probed.health.consider(probed.encoded, is_busy=False)
    await probed.until("ok", 2)
    names = {family.name for family in probed.server.registry.collect() if family.samples}
    assert {
        "scq_reconstruction_psnr_db",
        "scq_solver_iterations",
        "scq_solver_support_size",
        "scq_solver_kkt_residual",
        "scq_latent_error_ratio",
    } <= names


async def test_frames_that_wait_come_before_probes(probed: Probed) -> None:
    probed.health.consider(probed.encoded, is_busy=True)
    assert probed.count("skipped") == 1
    assert probed.count("ok") == 0


async def test_a_probe_that_fails_is_counted(
    probed: Probed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("told to fail")

    monkeypatch.setattr("vqserve.tokenizer.health.probe", fail)
    probed.health.consider(probed.encoded, is_busy=False)
    await probed.until("failed", 1)


def test_support_sizes_of_a_single_latent_picture() -> None:
    codec = FrameCodec(tiny_model(LABELLED))
    small = np.full((16, 16, 3), 99, np.uint8)
    sample = probe(codec, small, codec.encode(small))
    assert sample.iterations.shape == (1,)
