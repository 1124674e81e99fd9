"""The text transformer against diffusers' LDMBert as an oracle, and the published size."""

from typing import Any

import pytest
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

from ldm_scale.nn.transformer import TextTransformer

TOY: dict[str, Any] = {"vocab_size": 40, "max_length": 12, "width": 24, "layers": 3, "heads": 2, "head_dim": 8}


def ids() -> torch.Tensor:
    return torch.randint(0, 40, (3, 12), generator=torch.Generator().manual_seed(0))


def test_size_is_the_published_one_less_the_dead_head():
    with torch.device("meta"):
        model = TextTransformer(vocab_size=30522, max_length=77, width=1280, layers=32, heads=8, head_dim=64)
    assert sum(p.numel() for p in model.parameters()) == 542_895_360


@torch.no_grad()
def test_equals_diffusers_both_ways(randomise: Any):
    theirs = LDMBertModel(
        LDMBertConfig(
            vocab_size=40,
            max_position_embeddings=12,
            encoder_layers=3,
            encoder_ffn_dim=96,
            encoder_attention_heads=2,
            head_dim=8,
            d_model=24,
            attn_implementation="eager",
        )
    )
    ours = TextTransformer(**TOY).eval()
    randomise(theirs, 1)
    head = {name: tensor for name, tensor in theirs.state_dict().items() if name.startswith("to_logits.")}
    assert len(head) == 2  # the dead head: nothing else may differ
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k not in head}, strict=True)
    expected = theirs(ids()).last_hidden_state
    assert (ours(ids()) - expected).abs().max() <= 1e-5 * expected.abs().max()

    randomise(ours, 2)
    theirs.load_state_dict(ours.state_dict() | head, strict=True)
    expected = theirs(ids()).last_hidden_state
    assert (ours(ids()) - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_order_matters_and_padding_is_read(randomise: Any):
    """Learned positions; no mask, so a changed last token changes the first feature."""
    model = randomise(TextTransformer(**TOY), 3)
    tokens = ids()
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 40
    assert (model(tokens)[:, 0] - model(changed)[:, 0]).abs().max() > 1e-3
    swapped = tokens[:, [1, 0, *range(2, 12)]]
    assert (model(tokens)[:, [1, 0]] - model(swapped)[:, :2]).abs().max() > 1e-3


def test_gradients_reach_every_parameter(randomise: Any):
    model = randomise(TextTransformer(**TOY), 4)
    tokens = torch.arange(36).reshape(3, 12)
    (model(tokens) * torch.randn(3, 12, 24)).sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert without == []


def test_embeddings_start_as_wide_as_asked():
    torch.manual_seed(0)
    model = TextTransformer(**(TOY | {"vocab_size": 4000, "max_length": 400}), embedding_std=0.5).model
    assert model.embed_tokens.weight.std().item() == pytest.approx(0.5, rel=0.02)
    assert model.embed_positions.weight.std().item() == pytest.approx(0.5, rel=0.05)


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    model = TextTransformer(**TOY)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids()), model(ids()), rtol=1e-4, atol=1e-5)
