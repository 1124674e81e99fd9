"""Configuration files of the original code: the rows of facts.md 1.1 to 1.3, and small ones of each kind."""

import copy
from typing import Any

Config = dict[str, Any]
MODULES = "ldm.modules.encoders.modules"


def kl(z: int, mult: list[int], attended: list[int], ch: int = 128, **more: Any) -> Config:
    return {"target": "ldm.models.autoencoder.AutoencoderKL", "params": _first_stage(z, mult, attended, ch, True, more)}


def vq(z: int, mult: list[int], attended: list[int], codes: int, ch: int = 128, **more: Any) -> Config:
    params = {"n_embed": codes, **_first_stage(z, mult, attended, ch, False, more)}
    return {"target": "ldm.models.autoencoder.VQModelInterface", "params": params}


def _first_stage(z: int, mult: list[int], attended: list[int], ch: int, double_z: bool, more: Config) -> Config:
    shape = {
        "double_z": double_z, "z_channels": z, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": ch,
        "ch_mult": mult, "num_res_blocks": 2, "attn_resolutions": attended, "dropout": 0.0, **more,
    }  # fmt: skip
    return {"embed_dim": z, "monitor": "val/rec_loss", "ddconfig": shape, "lossconfig": {"target": "torch.nn.Identity"}}


def unet(io: tuple[int, int], width: int, mult: list[int], attended: list[int], **more: Any) -> Config:
    params = {
        "image_size": 64, "in_channels": io[0], "out_channels": io[1], "model_channels": width, "channel_mult": mult,
        "attention_resolutions": attended, "num_res_blocks": 2, **more,
    }  # fmt: skip
    return {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": params}


def model(unet: Config, first_stage: Config, condition: Config | str, **more: Any) -> Config:
    params = {
        "linear_start": 0.0015, "linear_end": 0.0195, "log_every_t": 200, "timesteps": 1000, "loss_type": "l2",
        "first_stage_key": "image", "image_size": 64, "channels": 3, "monitor": "val/loss_simple_ema",
        "unet_config": unet, "first_stage_config": first_stage, "cond_stage_config": condition, **more,
    }  # fmt: skip
    return {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "base_learning_rate": 1e-6, "params": params}


def condition(name: str, **params: Any) -> Config:
    return {"target": name if "." in name else f"{MODULES}.{name}", "params": params}


def transformer(context: int, depth: int = 1, **more: Any) -> Config:
    return {"use_spatial_transformer": True, "transformer_depth": depth, "context_dim": context, **more}


# At full scale: facts.md 1.1, then 1.2 and 1.3. -----------------------------------------------------------------------

KL_F8, VQ_F4 = kl(4, [1, 2, 4, 4], []), vq(3, [1, 2, 4], [], 8192)
VQ_F4_NOATTN = vq(3, [1, 2, 4], [], 8192, attn_type="none")
NOTHING = "__is_unconditional__"
CROSS: Config = {"conditioning_key": "crossattn"}

FIRST_STAGES: dict[str, tuple[Config, int, int]] = {  # configuration, parameters, tensors; facts.md 2.1
    "kl-f4": (kl(3, [1, 2, 4], []), 55_312_063, 204),
    "kl-f8": (KL_F8, 83_653_863, 248),
    "kl-f16": (kl(16, [1, 1, 2, 2, 4], [16]), 69_610_963, 342),
    "kl-f32": (kl(64, [1, 1, 2, 2, 4, 4], [16, 8]), 103_880_131, 436),
    "vq-f4": (VQ_F4, 55_322_782, 205),
    "vq-f4-noattn": (VQ_F4_NOATTN, 53_219_486, 185),
    "vq-f8": (vq(4, [1, 2, 2, 4], [32], 16384), 67_717_295, 299),
    "vq-f8-n256": (vq(4, [1, 2, 2, 4], [32], 256), 67_652_783, 299),
    "vq-f16": (vq(8, [1, 1, 2, 2, 4], [16], 16384), 69_593_371, 343),
}

MODELS: dict[str, tuple[Config, int, int, int]] = {
    # configuration, parameters and tensors of the U-Net, parameters of the conditioner; facts.md 2.2
    "celeba256": (
        model(unet((3, 3), 224, [1, 2, 3, 4], [8, 4, 2], num_head_channels=32), VQ_F4, NOTHING),
        274_056_163, 368, 0,
    ),
    "lsun_churches256": (
        model(
            unet((4, 4), 192, [1, 2, 2, 4, 4], [1, 2, 4, 8], num_heads=8, use_scale_shift_norm=True,
                 resblock_updown=True),
            KL_F8, NOTHING, loss_type="l1", linear_end=0.0155, scale_by_std=True,
        ),
        294_966_916, 520, 0,
    ),
    "cin256": (
        model(
            unet((4, 4), 256, [1, 2, 4], [4, 2, 1], num_head_channels=32, **transformer(512)),
            FIRST_STAGES["vq-f8"][0], condition("ClassEmbedder", embed_dim=512, key="class_label"), **CROSS,
        ),
        394_984_196, 626, 512_000,
    ),
    "cin256-v2": (
        model(
            unet((3, 3), 192, [1, 2, 3, 5], [8, 4, 2], num_heads=1, **transformer(512)),
            VQ_F4, condition("ClassEmbedder", embed_dim=512, n_classes=1001, key="class_label"), **CROSS, use_ema=False,
        ),
        400_920_579, 688, 512_512,
    ),
    "text2img256": (
        model(
            unet((3, 3), 192, [1, 2, 3, 5], [8, 4, 2], num_head_channels=32, **transformer(640)),
            VQ_F4, condition("BERTEmbedder", n_embed=640, n_layer=32), **CROSS,
        ),
        # facts.md 2.2 counts the unused head, which is not read: 640 x 30522 and 30522
        403_623_939, 688, 186_154_682 - 641 * 30522,
    ),
    "txt2img-1p4B": (
        model(
            unet((4, 4), 320, [1, 2, 4, 4], [4, 2, 1], num_heads=8, legacy=False, use_checkpoint=True,
                 **transformer(1280)),
            KL_F8, condition("BERTEmbedder", n_embed=1280, n_layer=32), **CROSS, use_ema=False,
            linear_start=0.00085, linear_end=0.012, scale_factor=0.18215,
        ),
        872_300_484, 686, 542_895_360,
    ),
    "stable_diffusion": (
        model(
            unet((4, 4), 320, [1, 2, 4, 4], [4, 2, 1], num_heads=8, legacy=False, use_checkpoint=True,
                 **transformer(768)),
            KL_F8, condition("FrozenCLIPEmbedder"), **CROSS,
            linear_start=0.00085, linear_end=0.012, scale_factor=0.18215,
        ),
        859_520_964, 686, 123_060_480,
    ),
    "layout2img": (
        model(
            unet((3, 3), 128, [1, 2, 3, 4], [8, 4, 2], num_head_channels=32, **transformer(512, depth=3)),
            VQ_F4,
            condition("BERTEmbedder", n_embed=512, n_layer=16, vocab_size=8192, max_seq_len=92, use_tokenizer=False),
            **CROSS, loss_type="l1", linear_end=0.0205,
        ),
        246_277_379, 1328, 58_858_496 - 513 * 8192,
    ),
    "inpainting_big": (
        model(
            unet((7, 3), 256, [1, 2, 3, 4], [8, 4, 2], num_heads=8, resblock_updown=True),
            VQ_F4_NOATTN, "__is_first_stage__", concat_mode=True, loss_type="l1", linear_end=0.0205,
        ),
        387_245_827, 416, 0,
    ),
    "bsr_sr": (
        model(
            unet((6, 3), 160, [1, 2, 2, 4], [16, 8], num_head_channels=32),
            VQ_F4, {"target": "torch.nn.Identity"}, concat_mode=True, linear_end=0.0155,
        ),
        113_622_563, 306, 0,
    ),
    "semantic_synthesis256": (
        model(
            unet((6, 3), 128, [1, 4, 8], [32, 16, 8], num_heads=8),
            VQ_F4, condition("SpatialRescaler", n_stages=2, in_channels=182, out_channels=3), concat_mode=True,
            loss_type="l1", linear_end=0.0205,
        ),
        215_229_315, 216, 546,
    ),
    "rdm768": (
        model(
            unet((16, 16), 448, [1, 2, 3, 4], [4, 2, 1], num_head_channels=32, **transformer(768), use_checkpoint=True),
            FIRST_STAGES["kl-f16"][0], {"target": "torch.nn.Identity"}, **CROSS,
            linear_end=0.015, scale_factor=0.22765929,
        ),
        1_335_480_400, 688, 0,
    ),
}  # fmt: skip

# Small, one of each kind. ---------------------------------------------------------------------------------------------

_KL, _VQ = kl(4, [1, 2], [128], ch=32), vq(3, [1, 2], [], 11, ch=32)
_TINY = ((4, 4), 32, [1, 2], [2, 1])


def _text(**more: Any) -> Config:
    return condition("BERTEmbedder", n_embed=24, n_layer=2, vocab_size=50, max_seq_len=8, **more)


SMALL: dict[str, Config] = {
    "txt2img": model(
        unet(*_TINY, num_heads=4, legacy=False, use_checkpoint=True, **transformer(24)), _KL, _text(), **CROSS,
        linear_start=0.00085, linear_end=0.012, scale_factor=0.18215, use_ema=False,
    ),
    "churches": model(
        unet(*_TINY, num_heads=8, use_scale_shift_norm=True, resblock_updown=True),
        _KL, NOTHING, loss_type="l1", scale_by_std=True,
    ),
    "celeba": model(unet((3, 3), 32, [1, 2], [2], num_head_channels=16), _VQ, NOTHING),
    "new_attention_order": model(
        unet((3, 3), 32, [1, 2], [2], num_heads=4, use_new_attention_order=True), _VQ, NOTHING
    ),
    "class": model(
        unet((3, 3), 32, [1, 2], [2], num_heads=1, **transformer(16)),
        _VQ, condition("ClassEmbedder", embed_dim=16, n_classes=12), **CROSS,
    ),
    "inpainting": model(
        unet((7, 3), 32, [1, 2], [2], num_heads=8, resblock_updown=True),
        vq(3, [1, 2], [], 11, ch=32, attn_type="none"), "__is_first_stage__", concat_mode=True,
    ),
    "superres": model(
        unet((6, 3), 32, [1, 2], [16, 2], num_head_channels=32), _VQ, {"target": "torch.nn.Identity"}, concat_mode=True
    ),
    "semantic": model(
        unet((6, 3), 32, [1, 2], [32], num_heads=8),
        _VQ, condition("SpatialRescaler", n_stages=1, in_channels=9, out_channels=3), concat_mode=True,
    ),
    "layout": model(
        unet((3, 3), 32, [1, 2], [2], num_head_channels=32, **transformer(24, depth=3)),
        _VQ, _text(use_tokenizer=False), **CROSS,
    ),
    "stable_diffusion": model(
        unet(*_TINY, num_heads=4, legacy=False, **transformer(24)), _KL,
        condition("FrozenCLIPEmbedder", version="", max_length=8), **CROSS,  # the test puts a directory there
    ),
    "embeddings": model(
        unet(*_TINY, num_head_channels=16, **transformer(24)), _KL, {"target": "torch.nn.Identity"}, **CROSS
    ),
    "pixels": model(
        unet((3, 3), 32, [1, 2], [2], num_head_channels=16),
        {"target": "ldm.models.autoencoder.IdentityFirstStage", "params": {"vq_interface": False}}, NOTHING,
    ),
}  # fmt: skip


def small(name: str, **changes: Any) -> Config:
    """One of SMALL; `changes` of its params, or of those of a part, as `unet_config__num_heads=2`."""
    config = copy.deepcopy(SMALL[name])
    for key, value in changes.items():
        *parts, last = key.split("__")
        params = config["params"]
        for part in parts:
            params = params[part] if part == "ddconfig" else params[part]["params"]
        params[last] = value
    return config
