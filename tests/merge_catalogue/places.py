"""The right changes in the wrong place, or the wrong way round."""

from dataclasses import replace

import numpy as np

from merge_catalogue.catalogue import has, layers, linear, wrong


def square(t):
    return t.shape[0] == t.shape[1]


def others(world, donor):
    """Each module adds the change of donor(site), its own where none is given."""
    by_name = {t.module: t for t in world.sites}
    return world.adding(lambda t: by_name.get(donor(t), t).delta)


def in_layer(t, layer):
    part = ".h." if ".h." in t.module else ".layer." if ".layer." in t.module else ".layers."
    return t.module.replace(f"{part}{t.layer}.", f"{part}{layer}.", 1)


def swapped(a, b):
    """The name of the module beside, where t is one of the two kinds."""

    def donor(t):
        end = {a: b, b: a}.get(t.kind)
        return t.module[: -len(t.kind)] + end if end else t.module

    return donor


@wrong(
    "W + (s B A)ᵀ in square layers",
    "transposed",
    r"transpos",
    lambda w: linear(w) and any(map(square, w.sites)),
)
def transposed(world):
    return world.adding(lambda t: t.delta.T if square(t) else t.delta)


@wrong(
    "the change's numbers read in the other order of axes",
    "mismatch transposed",
    r"transpos|order|mismatch",
    lambda w: linear(w) and not all(map(square, w.sites)),
)
def reshaped_instead_of_transposed(world):
    return world.adding(lambda t: np.ascontiguousarray(t.delta.T).reshape(t.shape))


@wrong(
    "fan_in_fan_out forgotten: a square Conv1D gets the transpose",
    "transposed",
    r"transpos|fan_in_fan_out",
    lambda w: linear(w) and any(t.transposed and square(t) for t in w.sites),
)
def fan_in_fan_out_forgotten(world):
    return world.adding(lambda t: t.delta.T if t.transposed and square(t) else t.delta)


def leaving_out(forgotten):
    return lambda world: world.merge(sites=[t for t in world.sites if not forgotten(t)])


@wrong("the base, byte for byte (verl 7285)", "not-applied", r"not.applied|base")
def base_itself(world):
    return dict(world.base)


@wrong("every second layer's changes are forgotten", "not-applied", r"not.applied", layers(2))
def every_second_layer_forgotten(world):
    return leaving_out(lambda t: t.layer is not None and t.layer % 2)(world)


@wrong(
    "only attention is merged",
    "not-applied",
    r"not.applied",
    lambda w: linear(w) and {"down_proj", "c_fc"} & {t.kind for t in w.sites},
)
def mlp_forgotten(world):
    return leaving_out(lambda t: ".mlp." in t.module)(world)


@wrong("one kind of module is not merged", "not-applied", r"not.applied", has("v_proj"))
def v_proj_forgotten(world):
    return leaving_out(lambda t: t.kind == "v_proj")(world)


@wrong("the last layer is not merged", "not-applied", r"not.applied", layers(2))
def last_layer_forgotten(world):
    last = max(t.layer for t in world.sites if t.layer is not None)
    return leaving_out(lambda t: t.layer == last)(world)


@wrong("one module of one layer is not merged", "not-applied", r"not.applied")
def one_module_forgotten(world):
    return leaving_out(lambda t: t.module == world.sites[-1].module)(world)


@wrong(
    "the embedding is not merged",
    "not-applied",
    r"not.applied",
    lambda w: linear(w) and any(t.kind in ("embed_tokens", "wte") for t in w.sites),
)
def embedding_forgotten(world):
    return leaving_out(lambda t: t.kind in ("embed_tokens", "wte"))(world)


@wrong("the head is not merged", "not-applied", r"not.applied", has("lm_head"))
def head_forgotten(world):
    return leaving_out(lambda t: t.kind == "lm_head")(world)


@wrong("layer i gets the change of layer i + 1", "other-module", r"layer|module", layers(2))
def layers_shifted_by_one(world):
    n = 1 + max(t.layer for t in world.sites if t.layer is not None)
    return others(world, lambda t: in_layer(t, (t.layer + 1) % n) if t.layer is not None else "")


@wrong("the last layer gets the first one's change", "other-module", r"layer|module", layers(2))
def layers_reversed(world):
    n = 1 + max(t.layer for t in world.sites if t.layer is not None)
    return others(world, lambda t: in_layer(t, n - 1 - t.layer) if t.layer is not None else "")


@wrong(
    "layers in the order of their names as texts: 0, 1, 10, 11, 2",
    "other-module",
    r"layer|module",
    layers(11),
)
def layers_sorted_as_texts(world):
    n = 1 + max(t.layer for t in world.sites if t.layer is not None)
    order = sorted(range(n), key=str)
    return others(world, lambda t: in_layer(t, order[t.layer]) if t.layer is not None else "")


@wrong("k and v exchanged", "other-module", r"module|v_proj|k_proj", has("k_proj", "v_proj"))
def k_and_v_exchanged(world):
    return others(world, swapped("k_proj", "v_proj"))


@wrong("gate and up exchanged", "other-module", r"module|up_proj", has("gate_proj", "up_proj"))
def gate_and_up_exchanged(world):
    return others(world, swapped("gate_proj", "up_proj"))


@wrong("query and value exchanged", "other-module", r"module|query|value", has("query", "value"))
def query_and_value_exchanged(world):
    return others(world, swapped("query", "value"))


@wrong("w1 and w3 exchanged", "other-module", r"module|w3", has("w1", "w3"))
def w1_and_w3_exchanged(world):
    return others(world, swapped("w1", "w3"))


@wrong("the experts' changes go to the next expert", "other-module", r"expert|module", has("w1"))
def experts_shifted(world):
    def donor(t):
        a, e, b = t.module.rpartition(".experts.")[0], *t.module.rsplit(".", 2)[1:]
        return f"{a}.experts.{(int(e) + 1) % 4}.{b}" if e.isdigit() else t.module

    return others(world, donor)


@wrong("every expert gets the first one's change", "other-module", r"expert|module", has("w1"))
def experts_all_as_the_first(world):
    def donor(t):
        a, e, b = t.module.rpartition(".experts.")[0], *t.module.rsplit(".", 2)[1:]
        return f"{a}.experts.0.{b}" if e.isdigit() else t.module

    return others(world, donor)


@wrong("the experts are not merged", "not-applied", r"not.applied", has("w1"))
def experts_forgotten(world):
    return leaving_out(lambda t: ".experts." in t.module)(world)


def mixed(world, donor, part):
    """A or B of the module that donor(site) names, if it fits."""
    by_name = {t.module: t for t in world.sites}

    def delta(t):
        other = by_name.get(donor(t), t)
        if getattr(other, part).shape != getattr(t, part).shape:
            return t.delta
        return replace(t, **{part: getattr(other, part)}).delta

    return world.adding(delta)


def next_layer(world):
    n = 1 + max(t.layer for t in world.sites if t.layer is not None)
    return lambda t: in_layer(t, (t.layer + 1) % n) if t.layer is not None else ""


@wrong(
    "A of the next layer",
    "mismatch other-module",
    r"\bA\b.*(layer|module)|(layer|module).*\bA\b",
    layers(2),
)
def a_of_the_next_layer(world):
    return mixed(world, next_layer(world), "A")


@wrong(
    "B of the next layer",
    "mismatch other-module",
    r"\bB\b.*(layer|module)|(layer|module).*\bB\b",
    layers(2),
)
def b_of_the_next_layer(world):
    return mixed(world, next_layer(world), "B")


@wrong("k_proj with v_proj's B", "mismatch other-module", r"\bB\b", has("k_proj", "v_proj"))
def b_of_k_and_v_exchanged(world):
    return mixed(world, swapped("k_proj", "v_proj"), "B")


def permuted(M, heads, back=False):
    """Rows in the order of llama.cpp's rotated pairs, or back."""
    shape = (heads, -1, 2) if back else (heads, 2, M.shape[0] // heads // 2)
    return M.reshape(*shape, M.shape[1]).swapaxes(1, 2).reshape(M.shape)


def heads_of(world, t):
    return {"q_proj": world.heads[0], "k_proj": world.heads[1]}.get(t.kind)


def rotated(world):
    return world.heads is not None and has("q_proj", "k_proj")(world)


@wrong(
    "q's and k's changes with the rows in llama.cpp's order",
    "mismatch",
    r"permut|order|rotary|rows",
    rotated,
)
def qk_changes_permuted(world):
    return world.adding(
        lambda t: permuted(t.delta, heads_of(world, t)) if heads_of(world, t) else t.delta
    )


@wrong(
    "q's and k's changes with the rows ordered back a second time",
    "mismatch",
    r"permut|order|rotary|rows",
    rotated,
)
def qk_changes_permuted_back(world):
    return world.adding(
        lambda t: permuted(t.delta, heads_of(world, t), True) if heads_of(world, t) else t.delta
    )


@wrong(
    "merged q and k, base and all, with the rows in llama.cpp's order",
    "mismatch",
    r"permut|order|rotary|rows",
    rotated,
)
def qk_permuted(world):
    return world.merge(
        lambda t, W: (
            permuted(t.merged(W), heads_of(world, t)) if heads_of(world, t) else t.merged(W)
        )
    )


@wrong(
    "k's rows ordered with the number of q's heads",
    "mismatch",
    r"permut|order|rotary|rows|head",
    lambda w: (
        rotated(w)
        and w.heads[0] != w.heads[1]
        and all(t.shape[0] % (2 * w.heads[0]) == 0 for t in w.sites if t.kind == "k_proj")
    ),
)
def k_permuted_by_q_heads(world):
    return world.merge(
        lambda t, W: permuted(t.merged(W), world.heads[0]) if t.kind == "k_proj" else t.merged(W)
    )


def fused(world):
    return bool({"qkv_proj", "c_attn"} & {t.kind for t in world.sites}) and linear(world)


def parts(world, t):
    """Where q, k and v lie in a fused projection."""
    m = t.shape[0]
    if world.heads:
        h, kv = world.heads
        d = m // (h + 2 * kv)
        return [(0, h * d), (h * d, (h + kv) * d), ((h + kv) * d, m)]
    return [(i * m // 3, (i + 1) * m // 3) for i in range(3)]


def of_fused(world, change):
    return world.adding(
        lambda t: change(t, parts(world, t)) if t.kind in ("qkv_proj", "c_attn") else t.delta
    )


@wrong(
    "k's and v's parts of a fused projection exchanged",
    "mismatch other-module",
    r"fused|part|order|rows",
    fused,
)
def fused_parts_exchanged(world):
    def change(t, cuts):
        q, k, v = (t.delta[a:b] for a, b in cuts)
        return np.concatenate([q, v, k])

    return of_fused(world, change)


@wrong("only q of a fused projection is merged", "mismatch not-applied", r"rows|part|fused", fused)
def only_q_of_a_fused_projection(world):
    def change(t, cuts):
        delta = t.delta.copy()
        delta[cuts[0][1] :] = 0
        return delta

    return of_fused(world, change)


@wrong(
    "a fused projection's rows head by head, not part by part",
    "mismatch",
    r"rows|order|permut|fused|interleav",
    lambda w: fused(w) and (w.heads is None or w.heads[0] == w.heads[1]),
)
def fused_parts_interleaved(world):
    h = world.heads[0] if world.heads else world.config["n_head"]
    return of_fused(
        world, lambda t, cuts: t.delta.reshape(3, h, -1, t.shape[1]).swapaxes(0, 1).reshape(t.shape)
    )


@wrong(
    "gate's and up's halves of a fused projection exchanged",
    "mismatch other-module",
    r"fused|part|order|rows|halves",
    has("gate_up_proj"),
)
def fused_halves_exchanged(world):
    return world.adding(
        lambda t: np.roll(t.delta, t.shape[0] // 2, 0) if t.kind == "gate_up_proj" else t.delta
    )


def ranks(keep):
    return lambda world: world.adding(lambda t: t.s * (t.B[:, keep(t.r)] @ t.A[keep(t.r)]))


def ranked(w):
    return linear(w) and min(t.r for t in w.sites) > 1


@wrong("the first half of the ranks alone", "mismatch factor", r"rank", ranked)
def half_of_the_ranks(world):
    return ranks(lambda r: slice(0, r // 2))(world)


@wrong("the last rank is cut off", "mismatch factor", r"rank", ranked)
def last_rank_lost(world):
    return ranks(lambda r: slice(0, r - 1))(world)


@wrong("A's ranks in reverse, B's not", "mismatch", r"rank|order|mismatch", ranked)
def ranks_reversed_in_a(world):
    return world.adding(lambda t: t.s * (t.B @ t.A[::-1]))


@wrong(
    "the columns of one of two tensor-parallel shards alone", "mismatch", r"column|shard|part|half"
)
def columns_of_one_shard(world):
    def delta(t):
        D = t.delta.copy()
        D[:, t.shape[1] // 2 :] = 0
        return D

    return world.adding(delta)


@wrong("the rows of one of two tensor-parallel shards alone", "mismatch", r"rows|shard|part|half")
def rows_of_one_shard(world):
    def delta(t):
        D = t.delta.copy()
        D[t.shape[0] // 2 :] = 0
        return D

    return world.adding(delta)


@wrong(
    "two tensor-parallel shards of the change in the other order",
    "mismatch",
    r"rows|shard|order|half|permut",
)
def shards_exchanged(world):
    return world.adding(lambda t: np.roll(t.delta, t.shape[0] // 2, 0))


@wrong(
    "B's columns read row by row: B reshaped from its transpose",
    "mismatch other-adapter",
    r"\bB\b|reshap|transpos|mismatch|not this adapter's change",
    ranked,
)
def b_reshaped(world):
    return world.adding(lambda t: t.s * (np.ascontiguousarray(t.B.T).reshape(t.B.shape) @ t.A))
