"""What makes a run the same run: which keys may differ when it is resumed.

`free` keys (engine, micro batch, intervals, tracker) may always change; `frozen` ones (networks, schedule, first stage,
seed) never, since the weights depend on them; every other key changes what is learned from here on, and asks for
`amend=true`.
"""

from pathlib import Path
from typing import Any

from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir

# fmt: off
FREE = (
    "amend", "batch_fit", "conditioning.model", "conditioning.tokenizer", "data.blocks_gb", "data.cache_dir",
    "data.cache_gb", "data.images", "data.index_dir", "data.latents", "data.removed", "data.selection", "data.threads",
    "data.validation", "engine.compile", "engine.kind", "engine.precision", "evaluation", "every",
    "first_stage.checkpoint", "guard.collect_every", "guard.phase_minutes", "guard.straggler",
    "guard.straggler_intervals", "guard.watchdog_minutes", "imports", "init", "init_what", "keep_every", "keep_last",
    "max_unsaved_minutes", "micro_batch", "name", "paths", "run_dir", "sampler", "tracker",
    "unet.activation_checkpointing",
)
FROZEN = (
    "autoencoder_loss", "conditioning", "data.task", "data.transform", "diffusion", "ema_half_lives", "experiment",
    "first_stage", "seed", "unet",
)
# fmt: on


Changes = dict[str, tuple[Any, Any]]
"""Keys by dotted path, each with its value before and now."""


def changes(run_dir: RunDir, config: dict[str, Any]) -> Changes:
    """Where this configuration differs from the one that the run directory was started with."""
    if not run_dir.config.exists():
        return {}
    return differences(storage.read_json(run_dir.config), config)


def differences(before: dict[str, Any], now: dict[str, Any]) -> Changes:
    """Where two configurations, as JSON values, differ."""
    one, other = _flat(before), _flat(now)
    return {
        key: (one.get(key), other.get(key))
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)
    }


def require_allowed(changed: Changes, *, amend: bool) -> None:
    """Refuse a resume that would not be the same run.

    raises  ValueError showing the difference and the way out
    """
    frozen = {key: pair for key, pair in changed.items() if _is_in(key, FROZEN) and not is_free(key)}
    if frozen:
        raise ValueError(f"this run was started with {shown(frozen)}. Start another: name=ANOTHER_NAME")
    amended = {key: pair for key, pair in changed.items() if not is_free(key)}
    if amended and not amend:
        raise ValueError(f"this run was started with {shown(amended)}. To go on with the new value: amend=true")


def is_finished(run_dir: RunDir, total_images: int) -> bool:
    """True where training already reached `total_images` and said so."""
    if not Path(run_dir.status).exists():
        return False
    status = storage.read_json(run_dir.status)
    return bool(status["state"] == "finished" and status["images"] >= total_images)


def is_free(key: str) -> bool:
    """True for a key on which no weight depends."""
    return _is_in(key, FREE)


def shown(changed: Changes) -> str:
    """Changes in words."""
    return ", ".join(f"{key}={before!r} (now {now!r})" for key, (before, now) in changed.items())


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _is_in(key: str, names: tuple[str, ...]) -> bool:
    """True for a key that is one of `names` or lies below one."""
    parts = key.split(".")
    return any(".".join(parts[:length]) in names for length in range(1, len(parts) + 1))
