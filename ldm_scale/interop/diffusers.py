"""To and from directories of diffusers: pipelines (text to image, Stable Diffusion v1, unconditional), single networks.

Our networks have diffusers' parameter names, so weights are copied as they are; config.json files are written and read
by `diffusers_config`. diffusers itself is not needed.

    python -m ldm_scale.interop.diffusers export MODEL OUT       MODEL: a training run, or what an import wrote
    python -m ldm_scale.interop.diffusers import DIRECTORY OUT   OUT: first_stage/ and latent_diffusion/ of bundle.py
"""

import argparse
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from ldm_scale.conditioning.base import Conditioner
from ldm_scale.conditioning.clip_text import ClipTextConditioner, ClipTextConfig
from ldm_scale.conditioning.text import TextConditioner
from ldm_scale.conditioning.tokenizer import FIRST, LAST, PAD, UNKNOWN
from ldm_scale.core import runtime, storage, weights
from ldm_scale.first_stage.base import FirstStage
from ldm_scale.interop import bundle as bundles
from ldm_scale.interop import compvis_file
from ldm_scale.interop import diffusers_config as words
from ldm_scale.interop.bundle import Bundle
from ldm_scale.nn.unet import UNet

_INDEX, _CONFIG, _SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
_MODEL, _TRANSFORMERS = "diffusion_pytorch_model", "model"  # stems of weight files
_PICKLES = {_MODEL: "diffusion_pytorch_model.bin", _TRANSFORMERS: "pytorch_model.bin"}
_PIPELINE_TOKENS = 77  # both text pipelines pad captions to this
_TEXT_TO_IMAGE, _STABLE_DIFFUSION, _UNCONDITIONAL = "LDMTextToImagePipeline", "StableDiffusionPipeline", "LDMPipeline"
_CLIP = "text_model."  # before the parameters of a CLIPTextModel, but for those in newer versions of transformers
_FIRST_STAGE_NAMES = {_TEXT_TO_IMAGE: "vqvae", _STABLE_DIFFUSION: "vae", _UNCONDITIONAL: "vqvae"}
# Attention of first stages and unconditional U-Nets in files from before diffusers 0.15.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION = re.compile(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.")

log = runtime.logger(__name__)


def export(bundle: Bundle, directory: Path, *, size: int) -> str:
    """Write a directory for diffusers' `from_pretrained`, and say which class that is of.

    size    side of the images that the pipeline draws unless told otherwise, pixels
    raises  ValueError naming what diffusers has no pipeline or network for, before anything is written
    """
    if bundle.unet is None or bundle.diffusion is None:
        return export_first_stage(bundle.first_stage, directory, latent_scale=bundle.latent_scale, size=size)
    bundle.latent_diffusion()  # refuses parts that do not fit one another
    pipeline = _pipeline(bundle.conditioner)
    first_stage = words.first_stage(bundle.first_stage.config, bundle.latent_scale, size)
    side = bundle.first_stage.config.latent_shape(size)[1]
    if pipeline == _TEXT_TO_IMAGE:
        side = words.text_to_image_sample_size(size, bundle.first_stage.factor)
    unet = words.unet(bundle.unet.config, side)
    name = _FIRST_STAGE_NAMES[pipeline]
    if pipeline == _STABLE_DIFFUSION and first_stage["_class_name"] != "AutoencoderKL":
        raise ValueError(f"{pipeline} takes a KL first stage, this model has a {first_stage['_class_name']}")
    parts = _export_text(bundle.conditioner, directory)
    _write(directory / name, first_stage, bundle.first_stage.state_dict(), _MODEL)
    _write(directory / "unet", unet, bundle.unet.state_dict(), _MODEL)
    scheduler = words.scheduler(bundle.diffusion)
    storage.write_json(directory / "scheduler" / _SCHEDULER, scheduler)
    index = {
        "_class_name": pipeline,
        "_diffusers_version": words.VERSION,
        name: ["diffusers", first_stage["_class_name"]],
        "unet": ["diffusers", unet["_class_name"]],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        **parts,
    }
    storage.write_json(directory / _INDEX, index)
    return pipeline


def export_first_stage(first_stage: FirstStage, directory: Path, *, latent_scale: float, size: int) -> str:
    """Write an AutoencoderKL or a VQModel, and say which; `size` is the usual side of its images, pixels."""
    config = words.first_stage(first_stage.config, latent_scale, size)
    _write(directory, config, first_stage.state_dict(), _MODEL)
    return str(config["_class_name"])


def export_unet(unet: UNet, directory: Path, *, sample_size: int) -> str:
    """Write a UNet2DConditionModel or a UNet2DModel, and say which; `sample_size` is the side of its latents."""
    config = words.unet(unet.config, sample_size)
    _write(directory, config, unet.state_dict(), _MODEL)
    return str(config["_class_name"])


def load(directory: Path) -> Bundle:
    """A pipeline's directory, or that of a single first stage, as our modules in evaluation mode.

    raises  FileNotFoundError where a file is absent; ValueError naming what we have no network for, or the weights that
            are missing, unexpected or mis-shaped
    """
    if not (directory / _INDEX).exists():
        first_stage, scale = load_first_stage(directory)
        return Bundle(first_stage=first_stage, unet=None, conditioner=None, diffusion=None, latent_scale=scale)
    index = storage.read_json(directory / _INDEX)
    pipeline = index["_class_name"]
    if pipeline not in _FIRST_STAGE_NAMES:
        raise ValueError(f"{directory} is a {pipeline}; those read here: {', '.join(_FIRST_STAGE_NAMES)}")
    first_stage, scale = load_first_stage(directory / _FIRST_STAGE_NAMES[pipeline])
    return Bundle(
        first_stage=first_stage,
        unet=load_unet(directory / "unet"),
        conditioner=_load_text(pipeline, directory),
        diffusion=words.read_scheduler(
            _read_config(directory / "scheduler" / _SCHEDULER), str(directory / "scheduler")
        ),
        latent_scale=scale,
    )


def load_first_stage(directory: Path) -> tuple[FirstStage, float]:
    """An AutoencoderKL or a VQModel as our module, and the scale of its latents."""
    config = words.read_first_stage(_read_config(directory / _CONFIG), str(directory / _CONFIG))
    assert config.scale is not None, "diffusers always has one"
    first_stage = config.build()
    weights.load_exactly(first_stage, _read_tensors(directory, _MODEL), str(directory))
    return first_stage.eval(), config.scale


def load_unet(directory: Path) -> UNet:
    """A UNet2DConditionModel or a UNet2DModel as our module."""
    unet = words.read_unet(_read_config(directory / _CONFIG), str(directory / _CONFIG)).build()
    weights.load_exactly(unet, _read_tensors(directory, _MODEL), str(directory))
    return unet.eval()


def _pipeline(conditioner: Conditioner | None) -> str:
    if conditioner is None:
        return _UNCONDITIONAL
    if not isinstance(conditioner, TextConditioner | ClipTextConditioner):
        raise ValueError(
            f"diffusers has no pipeline for a {type(conditioner).__name__}; export_first_stage and export_unet write "
            "the networks alone"
        )
    if conditioner.config.max_length != _PIPELINE_TOKENS:
        raise ValueError(
            f"conditioning.max_length={conditioner.config.max_length}: diffusers' pipelines pad captions to "
            f"{_PIPELINE_TOKENS} tokens; export_first_stage and export_unet write the networks alone"
        )
    return _TEXT_TO_IMAGE if isinstance(conditioner, TextConditioner) else _STABLE_DIFFUSION


def _export_text(conditioner: Conditioner | None, directory: Path) -> dict[str, Any]:
    """Text encoder and tokenizer, and what model_index.json says of them."""
    if isinstance(conditioner, TextConditioner):
        conditioner.load_tokenizer()  # refuses one that is absent, or not that of these weights
        _write_tokenizer(conditioner.config.tokenizer, directory / "tokenizer")
        # Without LDMBertModel's to_logits, which nothing reads and its loader does not need.
        tensors = conditioner.transformer.state_dict()
        _write(directory / "bert", words.text_transformer(conditioner.config), tensors, _TRANSFORMERS)
        return {"bert": ["latent_diffusion", "LDMBertModel"], "tokenizer": ["transformers", "PreTrainedTokenizerFast"]}
    if isinstance(conditioner, ClipTextConditioner):
        from transformers import CLIPTokenizer

        conditioner.load_tokenizer()
        CLIPTokenizer.from_pretrained(conditioner.config.model).save_pretrained(directory / "tokenizer")
        _write_clip(conditioner, directory / "text_encoder")
        return {
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
        }
    return {}


def _write_clip(conditioner: ClipTextConditioner, directory: Path) -> None:
    """A CLIPTextModel by the names of Stable Diffusion's own files, which every version of transformers reads."""
    config = {"architectures": ["CLIPTextModel"], **conditioner.transformer.config.to_diff_dict()}
    tensors = conditioner.transformer.state_dict()
    named = {_CLIP + name.removeprefix(_CLIP): tensor for name, tensor in tensors.items()}
    _write(directory, config, named, _TRANSFORMERS)


def _write_tokenizer(source: str, directory: Path) -> None:
    """The same tokenizer.json, so that ids cannot differ, and the names of its special tokens."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": _PIPELINE_TOKENS,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "cls_token": FIRST,
        "sep_token": LAST,
    }
    with storage.atomic_write(directory / "tokenizer.json") as file:
        file.write(_tokenizer_json(source).encode())
    storage.write_json(directory / "tokenizer_config.json", config)


def _tokenizer_json(source: str) -> str:
    for file in (Path(source), Path(source) / "tokenizer.json"):
        if file.is_file():
            return file.read_text(encoding="utf-8")
    from transformers import AutoTokenizer

    # Said outright, since a directory of a vocab.txt alone does not say it.
    text: str = AutoTokenizer.from_pretrained(source, tokenizer_type="bert").backend_tokenizer.to_str()
    return text


def _load_text(pipeline: str, directory: Path) -> Conditioner | None:
    if pipeline == _TEXT_TO_IMAGE:
        given, tokenizer = storage.read_json(directory / "bert" / _CONFIG), str(directory / "tokenizer")
        config = words.read_text_transformer(given, tokenizer, str(directory / "bert" / _CONFIG))
        tensors = _read_tensors(directory / "bert", _TRANSFORMERS)
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("to_logits.")}
        conditioner = config.build()
        weights.load_exactly(conditioner.transformer, kept, str(directory / "bert"))
        return conditioner.eval()
    if pipeline == _STABLE_DIFFUSION:
        return _load_clip(directory)
    return None


def _load_clip(directory: Path) -> Conditioner:
    from transformers import CLIPTextModel

    loaded: Any = CLIPTextModel.from_pretrained(
        directory / "text_encoder", local_files_only=True, output_loading_info=True
    )
    theirs, found = loaded
    if lacking := sorted(found["missing_keys"]):  # transformers would go on with random ones
        raise ValueError(f"{directory / 'text_encoder'} lacks weights: {', '.join(lacking)}")
    shape = theirs.config
    if shape.hidden_act != "quick_gelu" or shape.intermediate_size != 4 * shape.hidden_size:
        raise ValueError(
            f"{directory / 'text_encoder'}: hidden_act={shape.hidden_act}, intermediate_size={shape.intermediate_size};"
            f" the text encoder of Stable Diffusion v1 has quick_gelu and {4 * shape.hidden_size}"
        )
    conditioner = ClipTextConfig(
        model=str(directory / "tokenizer"),
        max_length=shape.max_position_embeddings,
        width=shape.hidden_size,
        layers=shape.num_hidden_layers,
        heads=shape.num_attention_heads,
        vocab_size=shape.vocab_size,
    ).build()
    weights.load_exactly(conditioner.transformer, theirs.state_dict(), str(directory / "text_encoder"))
    return conditioner.eval()


def _write(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], stem: str) -> None:
    """A network's directory; config.json last, so that a directory without it is unfinished."""
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with storage.atomic_write(directory / f"{stem}.safetensors") as file:
        file.write(safetensors.torch.save(held, metadata={"format": "pt"}))  # transformers reads no file without it
    storage.write_json(directory / _CONFIG, config)


def _read_config(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise FileNotFoundError(f"{file.parent} is none of diffusers' directories: it has no {file.name}")
    config: dict[str, Any] = storage.read_json(file)
    if "_class_name" not in config:
        raise ValueError(f"{file} does not say which class of diffusers it describes: it has no _class_name")
    return config


def _read_tensors(directory: Path, stem: str) -> dict[str, Tensor]:
    """Weights of one file or of several, by today's names.

    raises  FileNotFoundError where there are none; ValueError where a file is damaged, or a pickle with code in it
    """
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(directory, stem):
        tensors |= compvis_file.read(file)
    return {_OLD_ATTENTION.sub(_today, name): _squeezed(name, tensor) for name, tensor in tensors.items()}


def _weight_files(directory: Path, stem: str) -> list[Path]:
    index = directory / f"{stem}.safetensors.index.json"
    if index.exists():
        return [directory / name for name in sorted(set(storage.read_json(index)["weight_map"].values()))]
    for name in (f"{stem}.safetensors", _PICKLES[stem]):
        if (directory / name).exists():
            return [directory / name]
    raise FileNotFoundError(f"{directory} holds no weights: neither {stem}.safetensors nor {_PICKLES[stem]}")


def _today(match: re.Match[str]) -> str:
    return f"{match[1]}{_OLD_NAMES[match[2]]}."


def _squeezed(name: str, tensor: Tensor) -> Tensor:
    """Some old files keep attention's linear layers as 1 x 1 convolutions."""
    return tensor.flatten(1) if _OLD_ATTENTION.search(name) and tensor.ndim == 4 else tensor


def _export(arguments: argparse.Namespace) -> int:
    bundle = bundles.load(arguments.model, arguments.first_stage)
    name = export(bundle, arguments.out, size=arguments.size)
    print(f"\n{name}  {arguments.out}\n  next: diffusers.{name}.from_pretrained({str(arguments.out)!r})\n")
    return 0


def _import(arguments: argparse.Namespace) -> int:
    bundle = load(arguments.directory)
    tokenizer = arguments.out / "tokenizer"
    if isinstance(bundle.conditioner, TextConditioner | ClipTextConditioner):
        shutil.copytree(arguments.directory / "tokenizer", tokenizer, dirs_exist_ok=True)
    if isinstance(bundle.conditioner, TextConditioner):
        bundle.conditioner.config.tokenizer = str(tokenizer.resolve())
    if isinstance(bundle.conditioner, ClipTextConditioner):
        bundle.conditioner.config.model = str(tokenizer.resolve())
    for written in bundles.save(bundle, arguments.out):
        print(f"wrote  {written}")
    print(f"  next: train on it with first_stage.checkpoint={arguments.out / bundles.FIRST_STAGE}\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ldm_scale.interop.diffusers", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(required=True)
    out = commands.add_parser("export", help="write a directory that diffusers loads")
    out.add_argument(
        "model", type=Path, help="a training run, a directory that an import wrote, or a weights directory"
    )
    out.add_argument("out", type=Path, help="where the pipeline, or the network, is written")
    out.add_argument("--first-stage", type=Path, help="the first stage, where `model` does not say which")
    out.add_argument("--size", type=int, default=256, help="side of the images it draws, pixels (default: 256)")
    out.set_defaults(work=_export)
    back = commands.add_parser("import", help="read a directory of diffusers")
    back.add_argument("directory", type=Path, help="a pipeline's directory, or that of a first stage")
    back.add_argument("out", type=Path, help="where our weights directories are written")
    back.set_defaults(work=_import)
    arguments = parser.parse_args(argv)
    runtime.configure_logging()
    try:
        return int(arguments.work(arguments))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
