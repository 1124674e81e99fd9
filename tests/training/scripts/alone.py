"""Every engine in one plain process, one after the other, without a launcher; prints the kinds that trained."""

from pathlib import Path

import tiny
import torch
import torch.distributed as dist

from ldm_scale.core import runtime

trained = []
for kind in ("ddp", "zero1", "zero2", "zero3"):
    training = tiny.Training(tiny.engine_of(kind, precision="bf16", decay="all"), Path("unused"))
    start = training.weights()
    exact = tiny.tiny().state_dict()
    assert start is not None
    assert all(torch.equal(start[name], exact[name]) for name in start), "masters were rounded"
    training.run(2)
    for group in dist.distributed_c10d._world.pg_map:
        assert group._get_backend(torch.device("cpu")).options._timeout == runtime.PATIENCE, kind
    training.engine.close()
    trained.append(kind)
print(*trained)
