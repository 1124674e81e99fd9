"""What a latent cache looks like: each channel's mean and spread, and latents in false colour beside their images.

Decoded latents need the first stage, which tools do not know: `python -m ldm_scale.jobs.decoded` shows them.

Shape letters: B sampled latents, M channels of the moments, C channels of the latent, H W its
height and width.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_tools.contact_sheet import Histogram, Picture, false_colour, thumbnail
from data_tools.metadata import open_shards
from ldm_scale.core import progress
from ldm_scale.data.cache import CacheManifest, LatentCache
from ldm_scale.data.index import IMAGE_FIELDS
from ldm_scale.data.shards import CorruptSample, ShardSet
from ldm_scale.images.decode import UndecodableImage, decode

_CHANNELS = 16  # shown at most
_BINS = 24
_SPREAD = 3  # standard deviations that a histogram spans to either side


def cache_statistics(
    source: str, *, images: str | None, sample: int, shown: int
) -> tuple[dict[str, Any], dict[str, str], list[Histogram], list[Picture]]:
    """Report, facts, histograms and pictures of a latent cache.

    images  the shards it was made from, or None
    sample  latents to look into; `shown` of them appear as pictures
    """
    cache = LatentCache.open(source)
    manifest = cache.manifest
    ids = np.sort(np.random.default_rng(0).choice(cache.n, min(sample, cache.n), replace=False))
    latents, unreadable = _read(cache, ids)
    chosen = latents[:: max(len(latents) // max(shown, 1), 1)][:shown]
    originals = _originals(open_shards(images, None), manifest, chosen) if images else {}
    report = {
        "source": source,
        "latents": cache.n,
        "read": manifest.read,
        "rejected": manifest.rejected,
        "shape": manifest.shape,
        "kind": manifest.kind,
        "scale": 1 / manifest.latent_std,
        "channel_mean": manifest.channel_mean,
        "channel_std": manifest.channel_std,
        "sampled": len(ids),
        "unreadable": dict(unreadable),
        "without_image": len(chosen) - len(originals) if images else None,
    }
    pictures = [
        Picture((*originals.get(one.key, ()), *_channels(one, manifest)), one.key, one.caption or "no caption")
        for one in chosen
    ]
    return report, _facts(report, manifest), _histograms(latents, manifest), pictures


@dataclass(frozen=True, slots=True)
class _Latent:
    """One sampled latent."""

    sample_id: int
    key: str
    caption: str
    mean_CHW: np.ndarray


def _read(cache: LatentCache, ids: np.ndarray) -> tuple[list[_Latent], Counter[str]]:
    """The means of some latents, and how many could not be read, by reason."""
    latents, unreadable = [], Counter[str]()
    with progress.bar("latents", len(ids), unit="latents") as bar:
        for sample_id in ids.tolist():
            try:
                moments, captions, keys = cache.read(np.array([sample_id]))
                mean = _mean_of(moments[0].astype(np.float32), cache.manifest)
                latents.append(_Latent(sample_id, keys[0], captions[0], mean))
            except CorruptSample as error:
                unreadable[error.reason] += 1
            bar.advance(1)
    if not latents:
        raise ValueError(f"{cache.folder}: not one of {len(ids):,} sampled latents can be read: {dict(unreadable)}")
    return latents, unreadable


def _mean_of(moments_MHW: np.ndarray, manifest: CacheManifest) -> np.ndarray:
    return np.split(moments_MHW, 2)[0] if manifest.kind == "gaussian" else moments_MHW


def _originals(shards: ShardSet, manifest: CacheManifest, latents: Sequence[_Latent]) -> dict[str, tuple[str]]:
    """Thumbnails of the images that some latents were made from, by key; what is not there is left out."""
    starts = np.cumsum([0, *(record.written for record in manifest.shards)])
    found: dict[str, tuple[str]] = {}
    places: dict[str, dict[str, int]] = {}
    for latent in latents:
        source = manifest.shards[int(np.searchsorted(starts, latent.sample_id, side="right")) - 1].source["name"]
        if source not in places:
            ids = shards.shard_ids(shards.names.index(source)) if source in shards.names else np.arange(0)
            places[source] = dict(zip(shards.keys(ids), ids.tolist(), strict=True))
        if latent.key not in places[source]:
            continue
        try:
            members = shards.read(np.array([places[source][latent.key]]), IMAGE_FIELDS)[0]
            found[latent.key] = (thumbnail(decode(next(iter(members.values()), b""))),)
        except (CorruptSample, UndecodableImage):
            continue
    return found


def _channels(latent: _Latent, manifest: CacheManifest) -> list[str]:
    """Each channel in false colour, in standard deviations of the whole cache."""
    mean, std = (np.array(values)[:, None, None] for values in (manifest.channel_mean, manifest.channel_std))
    return [false_colour(channel) for channel in ((latent.mean_CHW - mean) / std)[:_CHANNELS]]


def _histograms(latents: Sequence[_Latent], manifest: CacheManifest) -> list[Histogram]:
    """Of each channel: the mean over a latent, and its spread within a latent."""
    mean_BC = np.array([latent.mean_CHW.mean(axis=(1, 2)) for latent in latents], float)
    std_BC = np.array([latent.mean_CHW.std(axis=(1, 2)) for latent in latents], float)
    histograms = []
    for c, (mean, std) in enumerate(zip(manifest.channel_mean, manifest.channel_std, strict=True)):
        said = f"cache: mean {mean:.3g}, std {std:.3g}"
        edges = np.linspace(mean - _SPREAD * std, mean + _SPREAD * std, _BINS + 1).tolist()
        histograms.append(Histogram.of(f"Channel {c}: mean of a latent", mean_BC[:, c], edges, said))
        edges = np.linspace(0, _SPREAD * std, _BINS + 1).tolist()
        histograms.append(Histogram.of(f"Channel {c}: spread within a latent", std_BC[:, c], edges, said))
    return histograms[: 2 * _CHANNELS]


def _facts(report: Mapping[str, Any], manifest: CacheManifest) -> dict[str, str]:
    """The report's numbers as a person reads them."""
    rejected = ", ".join(f"{count:,} {reason}" for reason, count in report["rejected"].items()) or "none"
    unreadable = ", ".join(f"{count:,} {reason}" for reason, count in report["unreadable"].items()) or "none"
    facts = {
        "latents": f"{report['latents']:,} of {report['read']:,} read",
        "shards": f"{len(manifest.shards):,}",
        "rejected": rejected,
        "moments": f"{' x '.join(map(str, report['shape']))} {manifest.dtype}, {report['kind']}",
        "latent scale (1 / std)": f"{report['scale']:.5f}",
        "first stage": f"{manifest.first_stage['kind']} {manifest.first_stage['sha256'][:12]}",
        "transform": ", ".join(f"{name} {value}" for name, value in manifest.transform.items()),
        "unreadable": f"{unreadable} of {report['sampled']:,} sampled",
    }
    if report["without_image"] is not None:
        facts["without image"] = f"{report['without_image']:,}"
    return facts
