"""What every layout, kernel and position is checked against: plain NumPy in float64, written from the paper alone.

Nothing here comes from `lct`. A scene is a list of `(text, (T, H, W), role)` tuples: the token count of the prompt, the
patch counts of the clip, and "shot" or "global". A global prompt, where there is one, is the first tuple of its scene
and therefore shot 0.
"""

from typing import NamedTuple

import numpy as np


class Row(NamedTuple):
    """One token of the packed sequence; `index` counts within the shot's text or within its video."""

    scene: int
    shot: int
    stream: str
    index: int


def row_table(scenes):
    """The rows in order: scene by scene, shot by shot, text before video, video in frame-height-width order."""
    table = []
    for scene_number, scene in enumerate(scenes):
        for shot_number, (text, (frames, height, width), _) in enumerate(scene):
            table += [Row(scene_number, shot_number, "text", i) for i in range(text)]
            table += [Row(scene_number, shot_number, "video", i) for i in range(frames * height * width)]
    return table


def mask(scenes, visibility):
    """Dense bool [S, S]: row i, the query, sees column j, the key (§3.2.2 bidirectional, §3.3 context-causal).

    `visibility` is "isolated", "bidirectional", "context_causal", or a selection: per scene, per shot, the earlier
    shots that the shot sees beside itself and the global prompt.
    """
    table = row_table(scenes)
    shots = [(s, n) for s, scene in enumerate(scenes) for n in range(len(scene))]
    number = {shot: k for k, shot in enumerate(shots)}
    sees = np.array([[_shot_sees(scenes, visibility, a, b) for b in shots] for a in shots], dtype=bool)
    shot_of_row = np.array([number[row.scene, row.shot] for row in table], dtype=int)
    return sees[np.ix_(shot_of_row, shot_of_row)]


def _shot_sees(scenes, visibility, query, key):
    """Whether the shot `query` sees the shot `key`, both given as (scene, shot)."""
    (query_scene, query_shot), (key_scene, key_shot) = query, key
    if query_scene != key_scene:
        return False
    if query_shot == key_shot or visibility == "bidirectional":
        return True
    if visibility == "context_causal":
        return key_shot < query_shot
    if scenes[key_scene][key_shot][2] == "global":
        return True
    return visibility != "isolated" and key_shot in visibility[query_scene][query_shot]


def positions(scenes, text_scale=1.0):
    """Float64 [S, 3], the interleaved (t, y, x) coordinates of Fig. 3 (b).

    Text walks the space diagonal in steps of `text_scale`, the video starts where its text ends, and the next shot
    starts past the video's longest side. Every scene starts at the origin.
    """
    rows = []
    for scene in scenes:
        origin = 0.0
        for text, (frames, height, width), _ in scene:
            rows += [(origin + text_scale * i,) * 3 for i in range(text)]
            corner = origin + text_scale * text
            for f in range(frames):
                for h in range(height):
                    rows += [(corner + f, corner + h, corner + w) for w in range(width)]
            origin = corner + max(frames, height, width)
    return np.array(rows, dtype=np.float64).reshape(-1, 3)


def flops(visible, heads, head_dim):
    """Forward attention FLOPs of the visible pairs: a multiply and an add, in QK and again in PV."""
    return 4 * int(np.count_nonzero(visible)) * heads * head_dim


def attention(q, k, v, visible, scale):
    """softmax(scale · q kᵀ) v over the visible keys of each row, in float64: (out [S, A, D], lse [A, S]).

    q is [S, A, D], k and v are [S_kv, A_kv, D], `visible` is bool [S, S_kv]; query head a reads head a // (A // A_kv).
    A row that sees nothing gives out 0 and lse −inf. Keys that a row does not see are never read, so they may be NaN.
    """
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    lse = np.full((q.shape[1], q.shape[0]), -np.inf)
    for row, head, seen, kv_head in _visible_problems(q, k, visible):
        scores = scale * (k[seen, kv_head] @ q[row, head])
        top = scores.max()
        weights = np.exp(scores - top)
        total = weights.sum()
        out[row, head] = weights @ v[seen, kv_head] / total
        lse[head, row] = top + np.log(total)
    return out, lse


def attention_gradients(q, k, v, visible, scale, dout):
    """Gradients (dq, dk, dv) of sum(out · dout), by the closed formulas.

    P = exp(scale·qkᵀ − lse), dV = Pᵀ dO, dS = P ∘ (dO Vᵀ − rowsum(dO ∘ O)), dQ = scale · dS K, dK = scale · dSᵀ Q.
    """
    q, k, v, dout = (np.asarray(x, dtype=np.float64) for x in (q, k, v, dout))
    out, lse = attention(q, k, v, visible, scale)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for row, head, seen, kv_head in _visible_problems(q, k, visible):
        keys, upstream = k[seen, kv_head], dout[row, head]
        probability = np.exp(scale * (keys @ q[row, head]) - lse[head, row])
        dscores = probability * (v[seen, kv_head] @ upstream - upstream @ out[row, head])
        dq[row, head] = scale * (dscores @ keys)
        dk[seen, kv_head] += scale * np.outer(dscores, q[row, head])
        dv[seen, kv_head] += np.outer(probability, upstream)
    return dq, dk, dv


def _visible_problems(q, k, visible):
    """Yield (row, head, indices of the keys it sees, its kv head) for every row that sees a key."""
    group = q.shape[1] // k.shape[1]
    for row in range(q.shape[0]):
        seen = np.flatnonzero(visible[row])
        if seen.size:
            for head in range(q.shape[1]):
                yield row, head, seen, head // group


def rms_norm(x, weight, eps, scope):
    """x / sqrt(mean(x²) + eps) · weight for x [S, A, D].

    The mean runs over one head's channels (scope "head", weight [D]) or over all heads (scope "row", weight [A·D]).
    """
    x, weight = np.asarray(x, dtype=np.float64), np.asarray(weight, dtype=np.float64)
    axes = {"head": (2,), "row": (1, 2)}[scope]
    weight = weight if scope == "head" else weight.reshape(x.shape[1:])
    return x / np.sqrt(np.mean(x**2, axis=axes, keepdims=True) + eps) * weight


def rope(x, coordinates, axes, theta):
    """Rotate channel pairs of x [S, A, D] by their coordinates [S, 3]; `axes` are the channels of t, y and x.

    Pair m of an axis with d channels is its channels 2m and 2m + 1 and turns by coordinate · theta^(−2m/d). The axes
    follow one another; channels beyond their sum stay as they are.
    """
    turned = np.array(x, dtype=np.float64)
    first = 0
    for axis, channels in enumerate(axes):
        for m in range(channels // 2):
            angle = np.asarray(coordinates, dtype=np.float64)[:, axis] * float(theta) ** (-2 * m / channels)
            cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
            even, odd = turned[:, :, first + 2 * m].copy(), turned[:, :, first + 2 * m + 1].copy()
            turned[:, :, first + 2 * m] = cos * even - sin * odd
            turned[:, :, first + 2 * m + 1] = sin * even + cos * odd
        first += channels
    return turned
