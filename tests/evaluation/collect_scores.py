"""One rank's share of a set of images; rank 0 writes the scores of all. collect_scores.py OUT WEIGHTS COUNT BATCH"""

import json
import sys
from pathlib import Path

import torch

from ldm_scale.core import runtime
from ldm_scale.core.shares import ranges, shared
from ldm_scale.evaluation.features import InceptionFeatures, RandomFeatures
from ldm_scale.evaluation.statistics import Collector, Score, compare


def images(of: str, indices: range) -> torch.Tensor:
    """The same pictures whoever asks: image i depends on i alone."""
    made = []
    for i in indices:
        generator = torch.Generator().manual_seed(i + (1000 if of == "real" else 0))
        coarse = torch.rand(1, 3, 4, 4, generator=generator) * 2 - 1
        made.append(torch.nn.functional.interpolate(coarse, size=32, mode="bilinear" if of == "real" else "nearest"))
    return torch.cat(made)


def main(out: str, weights: str, count: int, batch: int) -> None:
    runtime.join()
    found = {}
    for features, scores in (
        (RandomFeatures(), [Score.frechet, Score.kernel, Score.precision_recall]),
        *([(InceptionFeatures(weights), list(Score))] if weights else []),
    ):
        sets = []
        for of in ("generated", "real"):
            collector = Collector(features, count, scores)
            for indices, counts in shared(ranges(count, batch)):
                if counts:
                    collector.add(indices.start, collector.look(images(of, indices)))
            sets.append(collector.finish())
        assert sets[0].gaussian is not None and sets[0].gaussian.count == count
        found |= compare(*sets, scores, features.name)
    if runtime.is_main():
        Path(out).write_text(json.dumps(found))
    runtime.leave()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
