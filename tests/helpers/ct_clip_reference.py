"""CT-CLIP to the letter of its specification: slow, literal, sharing no code with the package.

The package's model is compared with it where the tensors recorded from the original are not available; where they
are, it is itself compared with them.
"""

import torch
from torch.nn import functional as F
from transformers import BertConfig, BertModel

SIZES = {
    "dim": 24,
    "codebook_size": 40,
    "image_size": [12, 8],
    "patch_size": 4,
    "temporal_patch_size": 2,
    "frames": 8,
    "spatial_depth": 2,
    "temporal_depth": 1,
    "dim_head": 6,
    "heads": 2,
    "dim_latent": 10,
    "text_config": {
        "vocab_size": 60,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
    },
}

PUBLISHED_SIZES = {
    "dim": 512,
    "codebook_size": 8192,
    "image_size": [480, 480],
    "patch_size": 20,
    "temporal_patch_size": 10,
    "frames": 240,
    "spatial_depth": 4,
    "temporal_depth": 4,
    "dim_head": 32,
    "heads": 8,
    "dim_latent": 512,
    "text_config": {"hidden_size": 768, "max_position_embeddings": 512},
}


def grid(sizes: dict) -> tuple[int, int, int]:
    rows, columns = (size // sizes["patch_size"] for size in sizes["image_size"])
    return sizes["frames"] // sizes["temporal_patch_size"], rows, columns


def shapes(sizes: dict) -> dict[str, tuple[int, ...]]:
    """Every key of a published checkpoint except BERT's, with its shape."""
    d, inner, c = sizes["dim"], sizes["heads"] * sizes["dim_head"], sizes["dim_head"]
    m = int(4 * (2 / 3) * d)
    frame_patch = sizes["patch_size"] ** 2
    patch = sizes["temporal_patch_size"] * frame_patch
    _, h, w = grid(sizes)
    found = {"temperature": (), "to_text_latent.weight": (sizes["dim_latent"], sizes["text_config"]["hidden_size"])}
    found["to_visual_latent.weight"] = (sizes["dim_latent"], h * w * d)
    found["to_text_latent_extra.weight"] = found["to_text_latent.weight"]
    found["to_visual_latent_extra.weight"] = found["to_visual_latent.weight"]
    vit = "visual_transformer."
    for name, size in (("to_patch_emb", patch), ("to_patch_emb_first_frame", frame_patch)):
        found |= {f"{vit}{name}.1.{part}": (size,) for part in ("weight", "bias")}
        found |= {f"{vit}{name}.2.weight": (d, size), f"{vit}{name}.2.bias": (d,)}
        found |= {f"{vit}{name}.3.{part}": (d,) for part in ("weight", "bias")}
    for name, size in (("to_pixels", patch), ("to_pixels_first_frame", frame_patch)):
        found |= {f"{vit}{name}.0.weight": (size, d), f"{vit}{name}.0.bias": (size,)}
    for name, rows, columns in (("0.0", d, 2), ("1.0", d, d), ("2", sizes["heads"], d)):
        net = f"{vit}spatial_rel_pos_bias.net.{name}."
        found |= {f"{net}weight": (rows, columns), f"{net}bias": (rows,)}
    for stage in ("spatial", "temporal"):
        encoder = f"{vit}enc_{stage}_transformer."
        for layer in range(sizes[f"{stage}_depth"]):
            at = f"{encoder}layers.{layer}."
            found |= {f"{at}0.dsconv.weight": (d, 1, 3, 3, 3), f"{at}0.dsconv.bias": (d,)}
            found |= {f"{at}1.{norm}.{part}": (d,) for norm in ("norm", "context_norm") for part in ("gamma", "beta")}
            found |= {f"{at}1.null_kv": (2, 0, c), f"{at}1.q_scale": (c,), f"{at}1.k_scale": (c,)}
            found |= {f"{at}1.to_q.weight": (inner, d), f"{at}1.to_kv.weight": (2 * inner, d)}
            found |= {f"{at}1.to_out.weight": (d, inner), f"{at}3.0.weight": (d,), f"{at}3.0.bias": (d,)}
            found |= {f"{at}3.1.weight": (2 * m, d), f"{at}3.4.weight": (d, m)}
        found |= {f"{encoder}norm_out.gamma": (d,), f"{encoder}norm_out.beta": (d,)}
    found[f"{vit}vq._codebook.embed"] = (1, sizes["codebook_size"], d)
    return found


def text_model(sizes: dict) -> BertModel:
    return BertModel(BertConfig(**sizes["text_config"])).eval()


def random_checkpoint(sizes: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict with the original's names, every weight drawn at random so that nothing cancels."""
    generator = torch.Generator().manual_seed(seed)
    bert = {f"text_transformer.{key}": tuple(value.shape) for key, value in text_model(sizes).state_dict().items()}
    state = {}
    for key, shape in (shapes(sizes) | bert).items():
        weight = torch.randn(shape, generator=generator) * 0.3
        is_scale = key.endswith(("gamma", "_scale", "LayerNorm.weight", "emb.1.weight", "emb.3.weight", "3.0.weight"))
        state[key] = weight * 0 if key.endswith("beta") else weight + 1 if is_scale else weight
    state["text_transformer.embeddings.position_ids"] = torch.arange(sizes["text_config"]["max_position_embeddings"])[
        None
    ]
    return state


def position_bias(state: dict, sizes: dict) -> torch.Tensor:
    """`(heads, tokens, tokens)`, one pair of tokens at a time."""
    _, h, w = grid(sizes)
    places = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1).reshape(-1, 2).float()
    offset = places[:, None] - places[None]
    hidden = (offset.sign() * torch.log(1 + offset.abs())).to(state["temperature"].dtype)
    for name in ("0.0", "1.0", "2"):
        net = f"visual_transformer.spatial_rel_pos_bias.net.{name}."
        hidden = F.linear(hidden, state[f"{net}weight"], state[f"{net}bias"])
        hidden = hidden if name == "2" else F.leaky_relu(hidden, 0.1)
    return hidden.permute(2, 0, 1)


def layer(state: dict, at: str, x: torch.Tensor, sizes: dict, bias: torch.Tensor | float) -> torch.Tensor:
    d, n, c = sizes["dim"], sizes["heads"], sizes["dim_head"]
    view = F.pad(x.reshape(-1, *grid(sizes), d).permute(0, 4, 1, 2, 3), (1, 1, 1, 1, 2, 0))
    moved = F.conv3d(view, state[f"{at}0.dsconv.weight"], state[f"{at}0.dsconv.bias"], groups=d)
    x = x + moved.permute(0, 2, 3, 4, 1).reshape(x.shape)

    q = F.layer_norm(x, (d,), state[f"{at}1.norm.gamma"]) @ state[f"{at}1.to_q.weight"].T
    k, v = (x @ state[f"{at}1.to_kv.weight"].T).chunk(2, dim=-1)
    q, k, v = (each.reshape(*each.shape[:-1], n, c).transpose(1, 2) for each in (q, k, v))
    q = q / q.norm(dim=-1, keepdim=True) * state[f"{at}1.q_scale"]
    k = k / k.norm(dim=-1, keepdim=True) * state[f"{at}1.k_scale"]
    attended = (8 * q @ k.transpose(-1, -2) + bias).softmax(-1) @ v
    x = x + attended.transpose(1, 2).reshape(*x.shape[:-1], n * c) @ state[f"{at}1.to_out.weight"].T

    hidden = F.layer_norm(x, (d,), state[f"{at}3.0.weight"], state[f"{at}3.0.bias"]) @ state[f"{at}3.1.weight"].T
    value, gate = hidden.chunk(2, dim=-1)
    return x + (value * F.gelu(gate)) @ state[f"{at}3.4.weight"].T


def stage(state: dict, name: str, x: torch.Tensor, sizes: dict, bias: torch.Tensor | float) -> torch.Tensor:
    encoder = f"visual_transformer.enc_{name}_transformer."
    for index in range(sizes[f"{name}_depth"]):
        x = layer(state, f"{encoder}layers.{index}.", x, sizes, bias)
    return F.layer_norm(x, (sizes["dim"],), state[f"{encoder}norm_out.gamma"])


def patch_embeddings(state: dict, pixel_values: torch.Tensor, sizes: dict) -> torch.Tensor:
    """`(batch, t, h, w, d)`, block by block."""
    p, pt = sizes["patch_size"], sizes["temporal_patch_size"]
    t, h, w = grid(sizes)
    blocks = [
        volume[0, i * pt : (i + 1) * pt, j * p : (j + 1) * p, k * p : (k + 1) * p].flatten()
        for volume in pixel_values
        for i in range(t)
        for j in range(h)
        for k in range(w)
    ]
    at = "visual_transformer.to_patch_emb."
    x = torch.stack(blocks)
    x = F.layer_norm(x, x.shape[-1:], state[f"{at}1.weight"], state[f"{at}1.bias"])
    x = F.linear(x, state[f"{at}2.weight"], state[f"{at}2.bias"])
    return F.layer_norm(x, x.shape[-1:], state[f"{at}3.weight"], state[f"{at}3.bias"]).reshape(
        -1, t, h, w, sizes["dim"]
    )


def run(state: dict, sizes: dict, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Everything that the recorded tensors hold, under their names; gradients reach whatever requires them."""
    out: dict[str, torch.Tensor] = {}
    t, h, w = grid(sizes)
    d, batch = sizes["dim"], len(inputs["pixel_values"])
    x = out["patch_embeddings"] = patch_embeddings(state, inputs["pixel_values"], sizes)
    bias = out["spatial_position_bias"] = position_bias(state, sizes)
    x = out["spatial_out"] = stage(state, "spatial", x.reshape(batch * t, h * w, d), sizes, bias)
    x = x.reshape(batch, t, h, w, d).permute(0, 2, 3, 1, 4).reshape(batch * h * w, t, d)
    x = out["temporal_out"] = stage(state, "temporal", x, sizes, 0.0)
    x = x.reshape(batch, h, w, t, d).permute(0, 3, 1, 2, 4).reshape(batch, t * h * w, d)
    codebook = state["visual_transformer.vq._codebook.embed"][0]
    ids = (F.normalize(x, dim=-1) @ F.normalize(codebook, dim=-1).T).argmax(-1)
    out["codebook_ids"] = ids.reshape(batch, t, h, w)
    out["quantized"] = x + (codebook[ids] - x).detach()
    tokens = out["image_tokens"] = out["quantized"].reshape(batch, t, h, w, d)
    latents = tokens.mean(1).reshape(batch, -1) @ state["to_visual_latent.weight"].T
    out["image_latents"] = F.normalize(latents, dim=-1)
    bert = text_model(sizes)
    prefix = "text_transformer."
    weights = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
    weights.pop("embeddings.position_ids", None)
    words = torch.func.functional_call(
        bert, weights, kwargs={"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    )
    out["text_latents"] = F.normalize(words.last_hidden_state[:, 0] @ state["to_text_latent.weight"].T, dim=-1)
    similarity = state["temperature"].exp() * out["text_latents"] @ out["image_latents"].T
    out["pair_logits"] = similarity.diagonal()
    out["zero_shot_probs"] = similarity[:2].T.softmax(-1)
    target = torch.arange(batch)
    out["loss"] = (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2
    return out
