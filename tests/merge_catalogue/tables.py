"""Embeddings, heads, ties, trained tokens and modules to save that are lost or put elsewhere."""

import re

import numpy as np

from merge_catalogue.catalogue import linear, wrong
from merge_catalogue.worlds import f32

TABLE = re.compile(r"(embed_tokens|wte|word_embeddings)$")


def table(world):
    return next((t for t in world.sites if TABLE.search(t.module)), None)


def adapted_table(world):
    return linear(world) and table(world) is not None


def untied(world):
    return linear(world) and "lm_head.weight" in world.base


@wrong(
    "the head has the table's change too, as if they were tied",
    "changed mismatch other-module",
    r"lm_head|tied|changed",
    lambda w: untied(w) and adapted_table(w) and not any(t.kind == "lm_head" for t in w.sites),
)
def head_changed_as_if_tied(world):
    M, t = world.merge(), table(world)
    M["lm_head.weight"] = (f32(M["lm_head.weight"]) + t.delta.T).astype(world.dtype)
    return M


@wrong(
    "a head of its own is replaced by the merged table",
    "changed mismatch wrong",
    r"lm_head|tied|embed",
    untied,
)
def head_replaced_by_the_table(world):
    M = world.merge()
    return M | {"lm_head.weight": M["model.embed_tokens.weight"]}


def tied_table(world):
    return adapted_table(world) and "lm_head.weight" not in world.base


@wrong(
    "the head stays tied to a table whose change is the table's alone (PEFT)",
    "changed mismatch",
    r"tied",
    tied_table,
)
def head_still_tied(world):
    return {n: a for n, a in world.merge().items() if n != "lm_head.weight"}


@wrong(
    "the head is untied, and both have the table's change",
    "changed mismatch",
    r"lm_head|tied",
    tied_table,
)
def untied_head_changed_too(world):
    M = world.merge()
    return M | {"lm_head.weight": M[table(world).weight]}


@wrong(
    "the table's rows are moved by one",
    "mismatch changed",
    r"row|order|mismatch|shift",
    adapted_table,
)
def table_rows_moved(world):
    return world.adding(lambda t: np.roll(t.delta, 1, 1) if TABLE.search(t.module) else t.delta)


@wrong(
    "the table's change is not transposed: read in the wrong order",
    "mismatch transposed other-adapter",
    r"transpos|order|mismatch|not this adapter's change",
    adapted_table,
)
def table_change_reshaped(world):
    return world.adding(
        lambda t: (
            np.ascontiguousarray(t.delta.T).reshape(t.shape) if TABLE.search(t.module) else t.delta
        )
    )


def trained(world):
    return world.tokens is not None


@wrong(
    "the trained tokens' rows are the base's", "not-applied mismatch", r"token|not.applied", trained
)
def trained_tokens_lost(world):
    return world.merge(tokens=False)


@wrong(
    "the trained rows are added to the base's instead of replacing them",
    "mismatch",
    r"token|row|added",
    trained,
)
def trained_tokens_added(world):
    M, (name, ids, rows) = world.merge(tokens=False), world.tokens
    M[name] = M[name].copy()
    M[name][ids] = (f32(M[name][ids]) + f32(rows)).astype(world.dtype)
    return M


@wrong("the trained rows stand at the next tokens", "mismatch other-module", r"token|row", trained)
def trained_tokens_at_other_rows(world):
    M, (name, ids, rows) = world.merge(tokens=False), world.tokens
    M[name] = M[name].copy()
    M[name][ids + 1] = rows.astype(world.dtype)
    return M


@wrong(
    "two trained rows are exchanged",
    "mismatch",
    r"token|row|order",
    lambda w: trained(w) and len(w.tokens[1]) > 1,
)
def trained_tokens_exchanged(world):
    M, (name, ids, rows) = world.merge(tokens=False), world.tokens
    M[name] = M[name].copy()
    M[name][ids] = rows[::-1].astype(world.dtype)
    return M


@wrong(
    "the head that is tied to trained tokens keeps its rows",
    "extra changed not-applied mismatch missing",
    r"lm_head|tie|token|not.applied",
    lambda w: trained(w) and "lm_head.weight" not in w.base,
)
def tied_head_without_the_trained_tokens(world):
    return world.merge() | {"lm_head.weight": world.base[world.tokens[0]]}


def saves(world):
    return bool(world.saved)


@wrong(
    "modules_to_save are the base's",
    "not-applied mismatch",
    r"modules_to_save|saved|not.applied",
    saves,
)
def saved_modules_lost(world):
    return world.merge(saved=False)


@wrong(
    "modules_to_save are added to the base's",
    "mismatch factor",
    r"modules_to_save|saved|added",
    saves,
)
def saved_modules_added(world):
    M = world.merge()
    return M | {
        n: (f32(world.base[n]) + f32(a)).astype(world.dtype) for n, a in world.saved.items()
    }


@wrong(
    "modules_to_save are another checkpoint's",
    "mismatch other-adapter",
    r"modules_to_save|saved|mismatch|checkpoint",
    saves,
)
def saved_modules_of_another_checkpoint(world):
    rng = np.random.default_rng(5)
    M = world.merge()
    return M | {
        n: (f32(a) * (1 + 0.02 * rng.standard_normal(a.shape))).astype(world.dtype)
        for n, a in world.saved.items()
    }


@wrong(
    "modules_to_save are half the base's and half the adapter's",
    "mismatch factor",
    r"modules_to_save|saved|half|0\.5",
    saves,
)
def saved_modules_averaged(world):
    M = world.merge()
    return M | {
        n: ((f32(world.base[n]) + f32(a)) / 2).astype(world.dtype) for n, a in world.saved.items()
    }
