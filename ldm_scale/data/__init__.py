"""Floor 3: shards, their index, who reads what when, and the latent cache."""
