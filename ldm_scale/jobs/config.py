"""How a job is composed, of dataclasses that stand beside their owners (and in jobs/schemas). Alone imports Hydra.

A configuration travels four roads (a group file, an experiment, `key=`, `+key=`), and on each an unknown key, a wrong
type or an impossible value is refused before anything is loaded, by the schemas registered here.
"""

import dataclasses
import difflib
import importlib
import itertools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from ldm_scale.conditioning.class_label import ClassLabelConfig
from ldm_scale.conditioning.clip_text import ClipTextConfig
from ldm_scale.conditioning.layout import LayoutConfig
from ldm_scale.conditioning.spatial import ConcatConfig, LabelMapConfig
from ldm_scale.conditioning.text import TextTransformerConfig
from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.core.secrets import without_secrets
from ldm_scale.data.config import DataConfig
from ldm_scale.first_stage.identity import IdentityConfig
from ldm_scale.first_stage.kl import AutoencoderKLConfig
from ldm_scale.first_stage.loss import AutoencoderLossConfig
from ldm_scale.first_stage.vq import AutoencoderVQConfig
from ldm_scale.jobs.schemas.drawing import Drawing
from ldm_scale.jobs.schemas.evaluate import EvaluateJob
from ldm_scale.jobs.schemas.experiment import EvaluationConfig, PathsConfig
from ldm_scale.jobs.schemas.precompute import PrecomputeJob
from ldm_scale.jobs.schemas.sample import SampleJob
from ldm_scale.jobs.schemas.train import TrainJob
from ldm_scale.latent_diffusion.model import DiffusionConfig
from ldm_scale.nn.unet import UNetConfig
from ldm_scale.samplers.ddim import DDIMConfig
from ldm_scale.samplers.ddpm import DDPMConfig
from ldm_scale.samplers.dpm_solver import DPMSolverConfig
from ldm_scale.samplers.plms import PLMSConfig
from ldm_scale.tracking.tracker import TrackerConfig
from ldm_scale.training.engine import EngineConfig
from ldm_scale.training.optimizer import OptimizerConfig

CONF = Path(__file__).parents[2] / "conf"
REFUSED_EXIT_CODE = 2
Job = TypeVar("Job")


def register(group: str, kind: str, config: type) -> None:
    """Make a config dataclass known: files of `conf/{group}` build on it by `defaults: [{kind}_schema]`.

    A part from outside this tree calls this when imported through `imports=[its.module]`.
    """
    ConfigStore.instance().store(group=group, name=f"{kind}_schema", node=config)
    _KINDS.setdefault(group, {})[kind] = config


_KINDS: dict[str, dict[str, type]] = {}
for _group, _kind, _config in (
    ("first_stage", "autoencoder_kl", AutoencoderKLConfig),
    ("first_stage", "autoencoder_vq", AutoencoderVQConfig),
    ("first_stage", "identity", IdentityConfig),
    ("autoencoder_loss", "autoencoder_loss", AutoencoderLossConfig),
    ("unet", "unet", UNetConfig),
    ("conditioning", "text_transformer", TextTransformerConfig),
    ("conditioning", "clip_text", ClipTextConfig),
    ("conditioning", "class_label", ClassLabelConfig),
    ("conditioning", "layout", LayoutConfig),
    ("conditioning", "label_map", LabelMapConfig),
    ("conditioning", "concat", ConcatConfig),
    ("diffusion", "diffusion", DiffusionConfig),
    ("sampler", "ddim", DDIMConfig),
    ("sampler", "ddpm", DDPMConfig),
    ("sampler", "dpm_solver", DPMSolverConfig),
    ("sampler", "plms", PLMSConfig),
    ("data", "data", DataConfig),
    ("engine", "engine", EngineConfig),
    ("optimizer", "adamw", OptimizerConfig),
    ("evaluation", "evaluation", EvaluationConfig),
    ("tracker", "tracker", TrackerConfig),
    ("paths", "paths", PathsConfig),
):
    register(_group, _kind, _config)

JOBS: Mapping[str, type] = {
    "train": TrainJob,
    "precompute_latents": PrecomputeJob,
    "sample": SampleJob,
    "evaluate": EvaluateJob,
}
for _name, _schema in JOBS.items():
    ConfigStore.instance().store(name=f"{_name}_schema", node=_schema)


def main(job: str, run: Callable[[Any], None]) -> None:
    """Compose the configuration of `job` from the command line, and run it."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what it would print and exit on; the words below are ours

    def start(config: DictConfig) -> None:
        run(read_job(config, JOBS[job]))

    def compose_and_start() -> None:
        import_parts(sys.argv[1:])
        sys.argv[1:] = with_model_defaults(job, sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=job)(start)()

    or_exit(compose_and_start)


def or_exit(job: Callable[[], None]) -> None:
    """Run a job; what a user can mend (a ValueError or a missing file) ends it in one plain sentence."""
    try:
        job()
    except (HydraException, OmegaConfBaseException) as error:
        _refuse(explain(error))
    except (ValueError, FileNotFoundError) as error:
        _refuse(str(error))


def _refuse(sentence: str) -> None:
    """End the process; with LDM_SCALE_TRACEBACK=1 by the exception itself."""
    if os.environ.get("LDM_SCALE_TRACEBACK") == "1":
        raise
    print(f"error: {without_secrets(sentence)}", file=sys.stderr)
    sys.exit(REFUSED_EXIT_CODE)


class BadConfig(ValueError):
    """A configuration that was composed, but says something impossible."""


def import_parts(overrides: Sequence[str]) -> None:
    """Import the modules that `imports=[...]` names, so that what they register can be composed."""
    for text in overrides:
        if text.startswith("imports="):
            modules = OverridesParser.create().parse_override(text).value()
            for module in modules if isinstance(modules, list) else [modules]:
                sys.path.append(os.getcwd())  # last: a job that runs a copy of the code has its parts from there
                importlib.import_module(str(module))
                sys.path.pop()


def with_model_defaults(job: str, overrides: Sequence[str]) -> list[str]:
    """For a job that draws with a trained model: its own sampler first, then what the user says.

    Scores are made as the training's own: with its `evaluation` and `seed` too.

    Another sampler (`sampler=NAME`) has its own file's values, but guides as the model's own does.
    """
    given = dict(text.split("=", 1) for text in overrides if "=" in text)
    if not issubclass(JOBS[job], Drawing):
        return list(overrides)
    if "run_dir" in given and (file := RunDir(Path(given["run_dir"])).config).exists():
        return [*_run_defaults(storage.read_json(file), JOBS[job], given), *overrides]
    if "model" in given and (file := Path(given["model"]) / "latent_diffusion" / "config.json").exists():
        conditioning = storage.read_json(file)["latent_diffusion"]["conditioning"]
        captioned = conditioning is not None and conditioning["schema"] in ("text_transformer", "clip_text")
        return [*([] if captioned else ["sampler.guidance=1"]), *overrides]  # the files' is for captions
    return list(overrides)


def _run_defaults(trained: Mapping[str, Any], schema: type, given: Mapping[str, str]) -> list[str]:
    sections = {"sampler", "evaluation"} & {f.name for f in dataclasses.fields(schema)}
    defaults = [f"seed={trained['seed']}"] if "evaluation" in sections else []
    for section in sections:
        chosen = section in given
        if section == "sampler" and not chosen:
            defaults.append(f"sampler={trained[section]['schema']}")
        left_out = ("schema", "prompts")  # these are drawn in training alone
        shared = [
            key for key in trained[section] if key.startswith("guidance" if chosen else "") and key not in left_out
        ]
        values = {key: "null" if trained[section][key] is None else trained[section][key] for key in shared}
        defaults += [f"{section}.{key}={value}" for key, value in values.items()]
    return defaults


def combinations(overrides: Sequence[str]) -> list[list[str]]:
    """All command lines that `key=1,2` or `key=range(1,4)` stand for, as Hydra's multirun reads them."""
    choices = []
    for text, one in zip(overrides, OverridesParser.create().parse_overrides(list(overrides)), strict=True):
        values = one.sweep_string_iterator() if one.is_sweep_override() else ()
        choices.append([f"{one.get_key_element()}={value}" for value in values] or [text])
    return [list(chosen) for chosen in itertools.product(*choices)]


def compose(job: str, overrides: Sequence[str]) -> Any:
    """The job that a command line would run: for tests and tools that are not started through Hydra."""
    import_parts(overrides)
    overrides = with_model_defaults(job, overrides)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return read_job(hydra.compose(job, overrides=list(overrides)), JOBS[job])


def read_job(config: DictConfig, schema: type[Job]) -> Job:
    """The composed configuration as dataclasses, each having checked itself.

    raises  BadConfig for an unknown key, an impossible value, or a key that was left out
    """
    _refuse_unknown(config, prefix="")
    missing = [str(key) for key in config if OmegaConf.is_missing(config, key)]
    if "experiment" in missing:
        names = ", ".join(sorted(file.stem for file in (CONF / "experiment").glob("*.yaml")))
        raise BadConfig(f"name an experiment: +experiment=NAME, one of {names}")
    missing = missing or sorted(OmegaConf.missing_keys(config))
    if missing:
        others = f" (also missing: {', '.join(missing[1:])})" if missing[1:] else ""
        raise BadConfig(f"{missing[0]} has no default here: add {missing[0]}=VALUE{others}")
    try:
        job = OmegaConf.to_object(config)
    except (ValueError, TypeError) as error:
        raise BadConfig(str(error)) from error
    assert isinstance(job, schema)
    return job


def _refuse_unknown(config: DictConfig, prefix: str) -> None:
    """`+key=` opens what the schema had closed; look at every key once more."""
    known = OmegaConf.get_type(config)
    if not dataclasses.is_dataclass(known):
        return
    names = [f.name for f in dataclasses.fields(known)]
    for key in map(str, config):
        if key not in names:
            raise BadConfig(_unknown_key(f"{prefix}{key}", names))
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none():
            _refuse_unknown(node, f"{prefix}{key}.")


def explain(error: BaseException) -> str:
    """What is wrong with a configuration, in one sentence: the key, what was given and what is allowed."""
    place = f"{str(error).split(':')[0]}: " if str(error).startswith("In '") else ""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            return place + _explain_key(cause)
        cause = cause.__cause__
    return str(error)


def _explain_key(error: OmegaConfBaseException) -> str:
    if isinstance(error, ValidationError):
        return f"{error.full_key}: {str(error.msg).splitlines()[0]}"
    parent = error.parent_node
    return _unknown_key(str(error.full_key), [str(key) for key in parent] if isinstance(parent, DictConfig) else [])


def _unknown_key(full_key: str, known: Sequence[str]) -> str:
    if not known:  # names of the user's own go here, and Hydra adds none without being told to
        return f"unknown key {full_key}. To add names: +{full_key.rpartition('.')[0]}={{NAME: ...}}, with a plus"
    close = difflib.get_close_matches(full_key.rpartition(".")[2], known, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    return f"unknown key {full_key}{hint} Known here: {', '.join(sorted(known))}"


def to_plain(config: Any) -> Any:
    """A config dataclass as JSON values; each registered part names its `schema`, for `from_plain`."""
    if dataclasses.is_dataclass(config):
        values = {f.name: to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
        kind = _kind_of(config)
        return {"schema": kind, **values} if kind is not None else values
    if isinstance(config, Enum):
        return config.name
    if isinstance(config, Mapping):
        return {key: to_plain(value) for key, value in config.items()}
    return [to_plain(value) for value in config] if isinstance(config, list) else config


def _kind_of(config: Any) -> str | None:
    """The name that the class of a part was registered by; None for what is no part."""
    kinds = (kind for known in _KINDS.values() for kind, one in known.items() if one is type(config))
    return next(kinds, None)


def from_plain(group: str, values: Mapping[str, Any]) -> Any:
    """The config dataclass of a part of `group` that `to_plain` wrote.

    raises  ValueError for a schema that nobody registered
    """
    plain = dict(values)
    kind = plain.pop("schema")
    if kind not in _KINDS[group]:
        raise ValueError(
            f"{group} {kind!r} is unknown here; known: {', '.join(_KINDS[group])}; imports=[...] brings others"
        )
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(_KINDS[group][kind]), plain))


def job_from_plain(job: str, values: Mapping[str, Any]) -> Any:
    """The job that `to_plain` wrote, having checked itself again.

    raises  ValueError for a schema that nobody registered, BadConfig for a key or value of another version
    """
    import_parts([f"imports=[{','.join(values['imports'])}]"])
    parts = {
        key: from_plain(key, value) if isinstance(value, Mapping) and "schema" in value else value
        for key, value in values.items()
    }
    try:
        merged = OmegaConf.merge(OmegaConf.structured(JOBS[job]), parts)
        assert isinstance(merged, DictConfig)
        return read_job(merged, JOBS[job])
    except OmegaConfBaseException as error:
        raise BadConfig(explain(error)) from error
