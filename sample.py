"""Draw with a trained model: `python sample.py run_dir=RUN 'prompts=[a red circle]'`. docs/sampling.md has the rest."""

from ldm_scale.jobs import config, sample

if __name__ == "__main__":
    config.main("sample", sample.run)
