"""Score a trained model on held-out images: `python evaluate.py run_dir=RUN`."""

from ldm_scale.jobs import config, evaluate

if __name__ == "__main__":
    config.main("evaluate", evaluate.run)
