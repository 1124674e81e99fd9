"""Floor 2: the arithmetic of diffusion: schedules and objectives."""
