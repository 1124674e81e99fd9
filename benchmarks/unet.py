"""Our U-Net against diffusers' UNet2DConditionModel: a forward and backward pass, same shape, dtype, weights and run.

    python benchmarks/unet.py [--channels 128] [--blocks 1] [--batch 16] [--passes 5] [--threads 0]

The text-to-image network of the paper, narrowed to `--channels` (320 there) and thinned to `--blocks` residual blocks a
level (2 there), so that compiling takes a minute or two; latents of 32 x 32, 77 context tokens. Prints, for float32 and
bfloat16, eager and compiled: seconds of each one's best pass, and theirs over ours (above 1, ours is faster). Then
memory in eager mode: what the forward pass keeps for the backward one, and the peak of the process above what it held
before the step, each measured in a process of its own. Compare ratios, not seconds.

On a CUDA device, where there is one, else on the CPU.
"""

import argparse
import multiprocessing
import os
import platform
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from ldm_scale.nn.unet import UNetConfig

CONTEXT_DIM = 256
HEADS = 4
MIB = 2**20
Step = Callable[[], None]


def networks(channels: int, blocks: int) -> dict[str, nn.Module]:
    """Ours and theirs with the same random weights; none of them zero, so that every branch has gradients."""
    config = UNetConfig(
        in_channels=4, out_channels=4, model_channels=channels, channel_mult=[1, 2, 4, 4], num_res_blocks=blocks,
        attention_factors=[1, 2, 4], num_heads=HEADS, context_dim=CONTEXT_DIM,
    )  # fmt: skip
    theirs: Any = diffusers.UNet2DConditionModel(
        block_out_channels=tuple(config.widths),
        layers_per_block=blocks,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=HEADS,  # the number of heads, by an old mistake of theirs
        cross_attention_dim=CONTEXT_DIM,
    )
    torch.manual_seed(0)
    ours = config.build()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return {"ours": ours, "theirs": theirs}


def step_of(name: str, network: nn.Module, batch: int, dtype: torch.dtype, device: torch.device) -> Step:
    """One forward and backward pass on fixed inputs; gradients are dropped first, as a training step does."""
    network.to(device, dtype)
    generator = torch.Generator().manual_seed(1)
    z_BCHW = torch.randn(batch, 4, 32, 32, generator=generator).to(device, dtype)
    context_BLD = torch.randn(batch, 77, CONTEXT_DIM, generator=generator).to(device, dtype)
    t_B = torch.full((batch,), 500, device=device)

    def out() -> Tensor:
        answer: Any = network(z_BCHW, t_B, context_BLD)
        return answer if name == "ours" else answer.sample

    def step() -> None:
        network.zero_grad(set_to_none=True)
        out().float().square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def best_seconds(steps: dict[str, Step], passes: int) -> dict[str, float]:
    """The best pass of each, taking turns so that a busy machine hits all alike; one more before that warms up."""
    best = dict.fromkeys(steps, float("inf"))
    for turn in range(passes + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if turn:
                best[name] = min(best[name], time.perf_counter() - began)
    return best


def kept_bytes(network: nn.Module, step: Step) -> int:
    """What autograd keeps between forward and backward, each storage once, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values())


def memory(name: str, channels: int, blocks: int, batch: int, dtype: torch.dtype, threads: int) -> tuple[int, int]:
    """Bytes kept for the backward pass, and the peak of a step above what was held before it; for a fresh process."""
    torch.set_num_threads(threads)
    device = _device()
    network = networks(channels, blocks)[name]
    step = step_of(name, network, batch, dtype, device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        step()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
        before = _resident("VmRSS")
        step()
        peak = _resident("VmHWM") - before
    return kept_bytes(network, step), peak


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    """Print one line for each dtype and mode, then one for each dtype's memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0 for one a CPU")
    options = parser.parse_args()
    threads = options.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    diffusers.utils.logging.set_verbosity_error()  # it warns of `to(dtype)`, about modules that are not here
    print(
        f"{platform.machine()}, {_device()}, {threads} threads, torch {torch.__version__}, diffusers "
        f"{diffusers.__version__}, {options.channels} channels, {options.blocks} blocks, batch {options.batch}; load "
        f"{os.getloadavg()[0]:.1f}"
    )
    for dtype in (torch.float32, torch.bfloat16):
        for mode in ("eager", "compiled"):
            steps = {}
            for name, network in networks(options.channels, options.blocks).items():
                ready: Any = network if mode == "eager" else torch.compile(network)
                steps[name] = step_of(name, ready, options.batch, dtype, _device())
            best = best_seconds(steps, options.passes)
            print(
                f"{str(dtype)[6:]:9s} {mode:9s} ours {best['ours']:7.3f} s   theirs {best['theirs']:7.3f} s   "
                f"{best['theirs'] / best['ours']:5.2f} x",
                flush=True,
            )
    fresh = multiprocessing.get_context("spawn")
    for dtype in (torch.float32, torch.bfloat16):
        figures = {}
        for name in ("ours", "theirs"):
            with ProcessPoolExecutor(1, mp_context=fresh) as pool:
                given = (name, options.channels, options.blocks, options.batch, dtype, threads)
                figures[name] = pool.submit(memory, *given).result()
        (kept, peak), (their_kept, their_peak) = figures["ours"], figures["theirs"]
        print(
            f"{str(dtype)[6:]:9s} memory    kept for backward {kept / MIB:7.1f} MiB, theirs {their_kept / MIB:7.1f} "
            f"({kept / their_kept:4.2f})   peak {peak / MIB:7.1f} MiB, theirs {their_peak / MIB:7.1f} "
            f"({peak / their_peak:4.2f})"
        )


if __name__ == "__main__":
    main()
