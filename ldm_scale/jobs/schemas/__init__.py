"""What may be said to each job: dataclasses that check themselves, composed by `ldm_scale.jobs.config`."""
