"""Features of images: what Frechet distance and its relatives are computed on.

Images in, one vector per image out; knows no model, image file or score. A fixed random network that needs nothing
(`fd_random`); the Inception of FID (Heusel et al. 2017) and the VGG-16 of improved precision and recall
(Kynkaanniemi et al. 2019), as torch-fidelity evaluates them. A score is called FID only when the weights are the
published ones.

Shape letters: B batch, C channels, H W height and width, D feature width.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from enum import Enum
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from torch import Tensor, nn

from ldm_scale.core import rng, storage, tensors

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""Name of the published weights, as torch-fidelity releases them."""
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_INCEPTION_SIZE = (299, 299)  # pixels


class Features(nn.Module, ABC):
    """A fixed network from images to features.

    name     what a Frechet distance on these features is logged as
    dim      D
    digest   sha256 of what fixes the numbers; two scores compare only if it is the same
    classes  K, of `logits`; None for a network that does not classify
    """

    name: str
    dim: int
    digest: str
    classes: int | None = None

    @abstractmethod
    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) images in [-1, 1] to (B, D) float32 features."""

    def logits(self, features_BD: Tensor) -> Tensor:
        """(B, K) for the Inception score."""
        raise NotImplementedError(f"{self.name} does not classify")


class RandomFeatures(Features):
    """How strongly an image excites random filters, and how unevenly, at four scales.

    Per scale: 3x3 convolution, absolute value, then mean and standard deviation over the image, square-rooted so that
    strong responses do not drown faint ones. All filters sum to zero, so that they see edges and textures, but for a
    few of the first scale, which see colour. Sees noise, blur, wrong colours and contrasts, missing shapes and missing
    variety; does not see where a thing is. Larger images are seen at more pixels: compare sets of one size, 16 x 16 or
    more.

    The weights come from a named integer stream (core/rng.py): the same bits on every machine, whatever else drew
    numbers.
    """

    _WIDTHS = (12, 14, 16, 18)
    _COLOUR_FILTERS = 4
    _FLOOR = 1e-4
    _MIN_SIDE = 16

    def __init__(self) -> None:
        super().__init__()
        self.name = "fd_random"
        self.dim = 2 * sum(self._WIDTHS)
        for scale, (wide_in, wide_out) in enumerate(zip((3, *self._WIDTHS), self._WIDTHS, strict=False)):
            filters = _random_filters(scale, wide_in, wide_out, sighted=self._COLOUR_FILTERS if scale == 0 else 0)
            self.register_buffer(f"filters_{scale}", filters)
        weights = b"".join(filters.numpy().tobytes() for filters in self.buffers())
        self.digest = hashlib.sha256(b"ldm_scale random features 1" + weights).hexdigest()

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> Tensor:
        if min(images_BCHW.shape[-2:]) < self._MIN_SIDE:
            raise ValueError(
                f"images of {tuple(images_BCHW.shape[-2:])} pixels; fd_random needs {self._MIN_SIDE} x {self._MIN_SIDE}"
            )
        hidden, pooled = images_BCHW.float(), []
        for scale, filters in enumerate(self.buffers()):
            hidden = F.avg_pool2d(hidden, 2) if scale else hidden
            hidden = F.conv2d(F.pad(hidden, (1, 1, 1, 1), mode="replicate"), filters).abs()
            pooled += [hidden.mean((2, 3)), hidden.std((2, 3))]
        return (torch.cat(pooled, dim=1) + self._FLOOR).sqrt()


def _random_filters(scale: int, wide_in: int, wide_out: int, *, sighted: int) -> Tensor:
    """(wide_out, wide_in, 3, 3) uniform filters; all but the first `sighted` sum to zero over space.

    Float64 arithmetic that IEEE 754 fixes to the last bit, rounded at the end: every machine gets the same filters.
    """
    shape = (wide_out, wide_in, 3, 3)
    uniform = rng.uniform(0, "evaluation.features", torch.tensor([scale]), shape)[0].double() * 2 - 1
    centred = uniform - uniform.sum((2, 3), keepdim=True) / 9
    filters = torch.cat((uniform[:sighted], centred[sighted:]))
    return (filters * math.sqrt(3 / (9 * wide_in))).float()


class Resizing(Enum):
    """How images are brought to the 299 x 299 pixels of Inception."""

    reference = "reference"
    """As TensorFlow 1 did, for which published FIDs were computed: bilinear, without a filter against aliasing."""
    clean = "clean"
    """Bicubic with such a filter, by Pillow, unrounded; Parmar et al. 2022 (clean-fid)."""


class InceptionFeatures(Features):
    """The 2,048 pooled features of Inception-v3 (2015-12-05), as torch-fidelity evaluates it.

    weights  the folder `paths.weights` that holds INCEPTION_FILE
    raises   FileNotFoundError when it does not
    """

    def __init__(self, weights: str | Path, resizing: Resizing = Resizing.reference):
        super().__init__()
        file = Path(weights) / INCEPTION_FILE
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist; FID needs it. Run `make fetch-weights` on a machine with internet, copy the "
                "folder here and point paths.weights at it"
            )
        _refuse_code(file)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # a second to import

        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(file))
        self.dim, self.classes = 2048, self.network.fc.out_features
        self._resizing = resizing
        sha256 = storage.sha256_file(file)
        clean = resizing is Resizing.clean
        self.digest = hashlib.sha256(f"{sha256} clean".encode()).hexdigest() if clean else sha256
        self.name = ("fid" if sha256 == INCEPTION_SHA256 else "fd_inception") + ("_clean" if clean else "")

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> Tensor:
        pixels_BCHW = tensors.to_uint8(images_BCHW)
        if self._resizing is Resizing.reference:
            return self._pooled(pixels_BCHW)
        resized_BCHW = _resize_cleanly(pixels_BCHW).to(pixels_BCHW.device)
        # The network takes whole numbers alone, and resizes them itself: what its first layer gets is put in there.
        hook = self.network.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, given: ((resized_BCHW - 128) / 128,))
        with hook:
            return self._pooled(pixels_BCHW)

    @torch.no_grad()
    def logits(self, features_BD: Tensor) -> Tensor:
        """Without the bias of the last layer, as Salimans et al. 2016 and torch-fidelity have it."""
        return features_BD @ self.network.fc.weight.T

    def _pooled(self, pixels_BCHW: Tensor) -> Tensor:
        features_BD: Tensor = self.network(pixels_BCHW)[0]
        return features_BD


class VggFeatures(Features):
    """The 4,096 activations of VGG-16's second fully connected layer, of images resized to 224 x 224.

    On these Kynkaanniemi et al. 2019 define improved precision and recall. Theirs were TensorFlow's weights; these are
    torchvision's, as torch-fidelity takes them.

    file  torchvision's VGG-16, whole
    """

    def __init__(self, file: str | Path):
        super().__init__()
        _refuse_code(Path(file))
        from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16  # a second to import

        self.network = FeatureExtractorVGG16("vgg16", ["fc2_relu"], str(file))
        self.name, self.dim = "fd_vgg16", 4096
        self.digest = storage.sha256_file(file)

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> Tensor:
        features_BD: Tensor = self.network(tensors.to_uint8(images_BCHW))[0]
        return features_BD


def _refuse_code(file: Path) -> None:
    """Refuse a pickle that runs code: torch-fidelity would not."""
    torch.load(file, map_location="cpu", weights_only=True)


def _resize_cleanly(pixels_BCHW: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 to (B, 3, 299, 299) float32 on the CPU, 0 to 255."""
    planes = pixels_BCHW.flatten(0, 1).cpu().float().numpy()
    resized = [Image.fromarray(plane, mode="F").resize(_INCEPTION_SIZE, Image.Resampling.BICUBIC) for plane in planes]
    stacked = torch.from_numpy(np.stack([np.asarray(plane) for plane in resized]))
    return stacked.clamp(0, 255).unflatten(0, pixels_BCHW.shape[:2])
