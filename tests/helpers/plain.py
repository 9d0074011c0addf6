"""The model written a second time, as an oracle: plain torch, no Megatron module's forward, no cache eviction, no
checkpoint, token-by-token delta rule."""

import torch
import torch.nn.functional as F

from powernap.model.mixers.delta_rule import sequential_delta_rule


def hybrid(stage, tokens, sliding=False):
    """The ordinary hybrid without sleep over whole sequences: attention within each window, or within a distance of one;
    one state over the whole sequence. Returns logits [B, T-1, vocabulary]."""
    model, inputs = stage.model, tokens[:, :-1]
    x = F.embedding(inputs, stage.embedding.weight)
    for kind, layer in zip(model.pattern, stage.decoder.layers, strict=True):
        y = norm(x, layer.input_layernorm, model)
        if kind == "G":
            y, _ = gated_delta_net(layer.self_attention, y, model)
        elif sliding:
            y = attention(layer.self_attention, project(layer.self_attention, y), model)
        else:
            parts = project(layer.self_attention, y).split(model.window, dim=1)
            y = torch.cat([attention(layer.self_attention, part, model) for part in parts], dim=1)
        x = x + y
        x = x + mlp(layer.mlp, norm(x, layer.pre_mlp_layernorm, model))
    return logits(stage, x)


def sleep(
    stage, tokens, predicting, passes, loop=None, backprop=None, linked=lambda x: x, handed=lambda x, embedded: x
):
    """Sliding eviction as in method.md, every pass of every window in full.

    Each attention block keeps queries, keys and values of all tokens so far, those of its last run over each window, and
    attends over the whole sequence whenever it runs.

    Args:
        predicting: the windows that are read once.
        loop: (i, j), blocks that repeat.
        backprop: number of a window's last passes that get gradients.
        linked: applied to the kept queries, keys and values when a window ends.
        handed: the input of a pass after the first, from the hidden states of the previous one and the embeddings.

    Returns:
        logits of each window in `predicting`, [B, L, vocabulary]
    """
    model, answers = stage.model, []
    blocks = list(enumerate(zip(model.pattern, stage.decoder.layers, strict=True)))
    first, last = loop or (0, len(blocks))
    earlier = [None] * len(blocks)  # attention: projections [B, n, 3D] of the tokens before; else the state
    for number, window in enumerate(tokens[:, :-1].split(model.window, dim=1)):
        x = embedded = F.embedding(window, stage.embedding.weight)
        times = 1 if number in predicting else passes
        latest = list(earlier)
        for time in range(times):
            x = handed(x, embedded) if time else x
            run = blocks[0 if time == 0 else first : len(blocks) if time == times - 1 else last]
            with torch.set_grad_enabled(backprop is None or time >= times - backprop):
                for index, (kind, layer) in run:
                    y = norm(x, layer.input_layernorm, model)
                    if kind == "G":
                        y, latest[index] = gated_delta_net(layer.self_attention, y, model, latest[index])
                    else:
                        y = project(layer.self_attention, y)
                        latest[index] = y if earlier[index] is None else torch.cat([earlier[index], y], dim=1)
                        y = attention(layer.self_attention, latest[index], model)[:, -window.shape[1] :]
                    x = x + y
                    x = x + mlp(layer.mlp, norm(x, layer.pre_mlp_layernorm, model))
        earlier = [x if kind == "G" else linked(x) for kind, x in zip(model.pattern, latest, strict=True)]
        if number in predicting:
            answers.append(logits(stage, x))
    return answers


def loss(logits, tokens, loss_mask):
    """Sum over the loss tokens; logits [B, T-1, vocabulary] of tokens [B, T]."""
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return (losses * loss_mask[:, 1:].flatten()).sum()


def logits(stage, x):
    head = stage.embedding if stage.model.tie_embeddings else stage.output_layer
    return F.linear(norm(x, stage.decoder.final_layernorm, stage.model), head.weight)


def norm(x, layer, model):
    return F.rms_norm(x, x.shape[-1:], layer.weight, model.norm_eps)


def mlp(layer, x):
    gate, up = F.linear(x, layer.linear_fc1.weight).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, layer.linear_fc2.weight)


def project(mixer, x):
    """Queries, keys and values without their positions: [B, T, D] -> [B, T, 3D]."""
    return F.linear(x, mixer.qkv_proj.weight)


def attention(mixer, qkv, model):
    """qkv [B, T, 3D]: every token sees itself and the window - 1 tokens before it."""
    batch, length, _ = qkv.shape
    head_dim = model.hidden_size // model.attention.heads
    q, k, v = qkv.view(batch, length, -1, 3, head_dim).transpose(1, 2).unbind(3)
    position, pair = (torch.arange(n, dtype=torch.float64) for n in (length, head_dim // 2))
    angle = position[:, None] * model.attention.rope_base ** (-2 * pair / head_dim)
    turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex128)

    def rotated(t):
        pairs = torch.complex(*t.chunk(2, dim=-1)) * turn
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    scores = rotated(q) @ rotated(k).transpose(-1, -2) / head_dim**0.5
    every = torch.ones(length, length).bool()
    hidden = every.triu(1) | every.tril(-model.window)
    scores = scores.masked_fill(hidden, -torch.inf)
    return F.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), mixer.out_proj.weight)


def write_strength(beta, model):
    return beta.sigmoid() * (2 if model.gdn.allow_neg_eigval else 1)


def gated_delta_net(mixer, x, model, state=None):
    batch, length, _ = x.shape
    k_dim, v_dim = model.gdn.key_dim, model.gdn.value_dim
    y = F.linear(x, mixer.in_proj.weight).view(batch, length, model.gdn.heads, -1)
    qkv, z, beta, alpha = y.split([2 * k_dim + v_dim, v_dim, 1, 1], dim=-1)
    pieces = []  # the convolution starts from zero padding in each window
    for part in qkv.split(model.window, dim=1):
        channels = part.flatten(2).transpose(1, 2)
        taps = mixer.conv_weight.flatten(0, 1).unsqueeze(1)
        padded = F.pad(channels, (model.gdn.conv_kernel - 1, 0))
        pieces.append(F.conv1d(padded, taps, groups=taps.shape[0]).transpose(1, 2).unflatten(2, part.shape[2:]))
    q, k, v = F.silu(torch.cat(pieces, dim=1)).split([k_dim, k_dim, v_dim], dim=-1)
    g = -mixer.A_log.exp() * F.softplus(alpha.squeeze(-1) + mixer.dt_bias)
    if state is None:
        state = x.new_zeros(batch, model.gdn.heads, k_dim, v_dim)
    output, state = sequential_delta_rule(
        F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, g, write_strength(beta.squeeze(-1), model), state
    )
    output = F.rms_norm(output, (v_dim,), mixer.norm.weight, model.norm_eps) * F.silu(z)
    return F.linear(output.flatten(2), mixer.out_proj.weight), state
