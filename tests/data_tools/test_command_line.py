import shlex

import pytest

from data_tools.command_line import precompute_command
from ldm_scale.jobs import config


@pytest.mark.parametrize("images", ["data/x", "/d/{00000..00002}.tar", "s3://b/laion/*.tar", "a.tar::b c.tar"])
def test_the_next_command_is_one_that_the_job_takes(images):
    said = precompute_command(images, selection="unique.parquet", index_dir="/scratch/my index")
    python, script, *overrides = shlex.split(said)
    assert (python, script, overrides[0]) == ("python", "precompute_latents.py", "+experiment=NAME")
    job = config.compose("precompute_latents", ["+experiment=txt2img_laion", "scale=toy", *overrides[1:]])
    assert (job.data.images, job.data.selection) == (images, ["unique.parquet"])
    assert job.data.index_dir == "/scratch/my index"
