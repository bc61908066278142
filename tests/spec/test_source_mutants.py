"""The tests are tested: nearly every small error in the source makes one of them fail.

What no test sees is listed here with the reason why nothing is to be seen.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import source_mutants

from minilora.spec import ops

ORDER = "the order of names is no matter"
LENGTHS = "the lengths are equal by construction, or were compared above"
RESHAPE = "NumPy takes any negative size for the one to be found"
FULL = "what more columns there are is not read"
BITS = "a table by its rows has the bits of the whole"
BEGIN = "at the first token nothing is copied"
IMPORTED = "the function that it makes was made when the module was imported"
SURVIVORS = {
    "ops": {
        "rope_tables: 0 -> 1": "the array is there for its dtype alone",
        "rope_tables: np.arange(0, d, 2, dtype=wide) -> np.arange(0, d, 2)": (
            "whole numbers are exact, and the factor beside them is wide"
        ),
        (
            "rope_tables: f(angles).astype(real).swapaxes(0, 1) -> "
            "f(angles).astype(real).swapaxes(1, 0)"
        ): ORDER,
        "split_heads: 1 -> 2": RESHAPE,
        "softmax: z.real -> z": (
            "NumPy orders complex numbers by their real parts, and whatever the shift, it cancels"
        ),
        "cross_entropy: z.real -> z": "as in softmax",
        "causal_mask: s < t -> s <= t": "each sees itself anyway",
    },
    "lora": {
        "project: zip(names, dparts, strict=True) -> zip(names, dparts)": LENGTHS,
        "project: True -> False": LENGTHS,
        "is_base: ('.weight', '.bias') -> ('.bias', '.weight')": ORDER,
    },
    "initialization": {
        "draw_dropout: rng.random(shape) >= p -> rng.random(shape) > p": (
            "a number drawn equals p with a probability of 2⁻⁵³"
        ),
        (
            "_truncated: np.linalg.svd(M.astype(np.float64), full_matrices=False) -> "
            "np.linalg.svd(M.astype(np.float64))"
        ): FULL,
        "_truncated: False -> True": FULL,
        "orthogonal: 2 -> 1 (2)": "1 is odd",
        (
            "_drawn: (W, *draw_factors(rng, init, r, *W.shape)) -> "
            "(*draw_factors(rng, init, r, *W.shape), W)"
        ): IMPORTED,
        (
            "_drawn: draw_factors(rng, init, r, *W.shape) -> draw_factors(init, rng, r, *W.shape)"
        ): IMPORTED,
        (
            "_drawn: draw_factors(rng, init, r, *W.shape) -> draw_factors(rng, r, init, *W.shape)"
        ): IMPORTED,
        (
            "_drawn: draw_factors(rng, init, r, *W.shape) -> draw_factors(rng, init, *W.shape, r)"
        ): IMPORTED,
    },
    **{
        f"spec.variants.{module}": {}
        for module in ("entry", "lora_bias", "dora", "vera", "adalora", "alora")
    },
    "layers": {
        "adapted_fused: zip(parts, P, strict=True) -> zip(parts, P)": LENGTHS,
        "adapted_fused: True -> False": LENGTHS,
        "adapted_fused: zip(parts, P, pairs, strict=True) -> zip(parts, P, pairs)": LENGTHS,
        "adapted_fused: True -> False (2)": LENGTHS,
        "adapted_experts: np.argsort(index, kind='stable') -> np.argsort(index)": (
            "the order of an expert's columns is no matter, since they go back to their places"
        ),
        "adapted_experts: zip(*dPs, strict=True) -> zip(*dPs)": LENGTHS,
        "adapted_experts: True -> False": LENGTHS,
        "Geometry.places: 1 -> 2 (8)": RESHAPE,
        "unfold: 1 -> 2": RESHAPE,
        "unfold: 1 -> 2 (4)": RESHAPE,
        "conv: 1 -> 2 (2)": RESHAPE,
        "conv: 1 -> 2 (4)": RESHAPE,
        "adapted_conv: 1 -> 2 (2)": RESHAPE,
        "adapted_conv: 1 -> 2 (4)": RESHAPE,
        "merge_conv: 1 -> 2 (2)": RESHAPE,
    },
    "target_modules": {
        (
            "LoraConfig._check_names: ('none', 'lora_only', 'all') -> ('lora_only', 'none', 'all')"
        ): ORDER,
        (
            "LoraConfig._check_names: ('none', 'lora_only', 'all') -> ('none', 'all', 'lora_only')"
        ): ORDER,
        "LoraConfig._check_names: ('', *INITIALIZATIONS) -> (*INITIALIZATIONS, '')": ORDER,
        (
            "LoraConfig._check_patterns: (self.target_modules, self.exclude_modules) -> "
            "(self.exclude_modules, self.target_modules)"
        ): ORDER,
        **dict.fromkeys(
            (
                "LoraConfig._check_patterns: (*whole, *self.rank_pattern, *self.alpha_pattern, "
                f"*self.modules_to_save) -> ({order})"
                for order in (
                    "*self.rank_pattern, *whole, *self.alpha_pattern, *self.modules_to_save",
                    "*whole, *self.alpha_pattern, *self.rank_pattern, *self.modules_to_save",
                    "*whole, *self.rank_pattern, *self.modules_to_save, *self.alpha_pattern",
                )
            ),
            ORDER,
        ),
        (
            "LoraConfig._check_numbers: (self.lora_alpha, *self.alpha_pattern.values()) -> "
            "(*self.alpha_pattern.values(), self.lora_alpha)"
        ): ORDER,
        (
            "LoraConfig._check_numbers: (self.r, *self.rank_pattern.values()) -> "
            "(*self.rank_pattern.values(), self.r)"
        ): ORDER,
        "_matched: ('head', *TABLES) -> (*TABLES, 'head')": ORDER,
        (
            "_check_matched: ('rank_pattern', 'alpha_pattern') -> ('alpha_pattern', 'rank_pattern')"
        ): ORDER,
        (
            "inject: zip(lora.equation.parts, parts, strict=True) -> "
            "zip(lora.equation.parts, parts)"
        ): LENGTHS,
        "inject: True -> False": LENGTHS,
        (
            "_shared_factors: zip(*targets.shape.values(), strict=True) -> "
            "zip(*targets.shape.values())"
        ): LENGTHS,
        "_shared_factors: True -> False": LENGTHS,
        "_shared_factors: 0 -> 1": "of the outline the shape and the dtype alone are read",
        "_shared_factors: 1 -> 2": "a shared draw does not read the scale",
        "_shared_factors: 1 -> 0": "a shared draw does not read the scale",
        "with_invocation: 1 -> 2 (2)": RESHAPE,
        (
            "tied_gradients: zip(('head.A', 'head.B'), twin(dA, dB), strict=True) -> "
            "zip(('head.A', 'head.B'), twin(dA, dB))"
        ): LENGTHS,
        "tied_gradients: True -> False": LENGTHS,
    },
    "blocks": {
        "embed: zip(names, back_y(dy)[1:], strict=True) -> zip(names, back_y(dy)[1:])": LENGTHS,
        "embed: True -> False": LENGTHS,
        "normalise: zip(names, gradients, strict=True) -> zip(names, gradients)": LENGTHS,
        "normalise: True -> False": LENGTHS,
    },
    "models": {
        "Config.shapes: ('weight', 'bias') -> ('bias', 'weight')": ORDER,
        "Config.shapes: ('norm1', 'norm2') -> ('norm2', 'norm1')": ORDER,
        "Config.shapes: [*norms, 'norm'] -> ['norm', *norms]": ORDER,
        "Llama.has_bias: ('.q', '.k', '.v') -> ('.k', '.q', '.v')": ORDER,
        "Llama.has_bias: ('.q', '.k', '.v') -> ('.q', '.v', '.k')": ORDER,
    },
    "training.attention": {
        "by_queries: t <= QUERIES -> t < QUERIES": "one block is the whole",
        "by_queries: (0, 2) -> (2, 0)": ORDER,
        "by_queries: (do, k, v) -> (do, v, k)": "keys and values have one shape",
    },
    "training.checkpointing": {
        (
            "constant_inputs: ('layers.', *(f'{at}.' for at in ABOVE[causal])) -> "
            "(*(f'{at}.' for at in ABOVE[causal]), 'layers.')"
        ): ORDER,
        "prepared: ('weight', 'A') -> ('A', 'weight')": ORDER,
    },
    "training.chunked_head": {
        "head_loss: len(E) * labels.size > LARGE -> len(E) * labels.size >= LARGE": BITS,
        "_in_chunks: 1 -> 2": "of no column, a second chunk has none either",
        (
            "_in_chunks: zip(*map(loss_of, chunks), strict=True) -> zip(*map(loss_of, chunks))"
        ): LENGTHS,
        "_in_chunks: True -> False": LENGTHS,
        "_with_head: as_table(E) if by_rows else np.asarray(E) -> as_table(E)": BITS,
    },
    "training.kv_cache": {
        "KVCache.append: (k[..., :0], v[..., :0]) -> (v[..., :0], k[..., :0])": BEGIN,
        "KVCache.append: (k, v) -> (v, k)": "keys and values have one shape",
        (
            "KVCache.append: zip(room, self.held[block], strict=True) -> "
            "zip(room, self.held[block])"
        ): LENGTHS,
        "KVCache.append: True -> False": LENGTHS,
        (
            "KVCache.append: zip(self.held[block], (k, v), strict=True) -> "
            "zip(self.held[block], (k, v))"
        ): LENGTHS,
        "KVCache.append: True -> False (2)": LENGTHS,
    },
    "training.fused_adamw": {
        (
            "_alike: (rates[name], p.dtype, gradients[name].dtype, name in state.m) -> "
            "(p.dtype, rates[name], gradients[name].dtype, name in state.m)"
        ): ORDER,
        (
            "_alike: (rates[name], p.dtype, gradients[name].dtype, name in state.m) -> "
            "(rates[name], gradients[name].dtype, p.dtype, name in state.m)"
        ): ORDER,
        (
            "_alike: (rates[name], p.dtype, gradients[name].dtype, name in state.m) -> "
            "(rates[name], p.dtype, name in state.m, gradients[name].dtype)"
        ): ORDER,
        "_alike: name in state.m -> name not in state.m": "what differs, differs either way",
        "_parted: 1 -> 0": "a run of one array is the array itself",
    },
    "optim": {
        "run: ('betas', 'eps', 'weight_decay') -> ('eps', 'betas', 'weight_decay')": ORDER,
        "run: ('betas', 'eps', 'weight_decay') -> ('betas', 'weight_decay', 'eps')": ORDER,
        "run: ('momentum', 'weight_decay') -> ('weight_decay', 'momentum')": ORDER,
    },
}


@pytest.fixture(scope="module")
def results():
    command = [sys.executable, source_mutants.__file__, *SURVIVORS]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.very_slow
@pytest.mark.parametrize("module", SURVIVORS)
def test_every_mutant_that_lives_is_listed_with_its_reason(module, results):
    assert results[module]["count"] > 30
    assert set(results[module]["survivors"]) == SURVIVORS[module].keys()


SOURCE = '''
def f(x, n=2):
    """Not mutated: 1 + 1."""
    if x is None:
        raise ValueError(f"{n + 1}")
    y: int = g(x.T, n)
    return y @ x - 0.5
'''


def test_mutants_differ_in_one_place_each():
    assert [key for _, key, _ in source_mutants.mutants(SOURCE)] == [
        "f: 2 -> 3",
        "f: 2 -> 1",
        "f: if x is None: -> if not x is None:",
        "f: x is None -> x is not None",
        "f: g(x.T, n) -> g(n, x.T)",
        "f: x.T -> x",
        "f: y @ x - 0.5 -> y @ x + 0.5",
        "f: y @ x - 0.5 -> y @ x",
        "f: y @ x -> x @ y",
        "f: 0.5 -> 0.5005",
    ]
    trees = {ast.dump(tree) for _, _, tree in source_mutants.mutants(SOURCE)}
    assert len(trees) == 10
    assert ast.dump(ast.parse(SOURCE)) not in trees


def test_a_mutant_is_killed_by_the_test_that_sees_it_and_lives_with_another(monkeypatch):
    monkeypatch.setattr(source_mutants, "run", lambda test: test())
    source = Path(ops.__file__).read_text()
    tree = next(
        t for _, key, t in source_mutants.mutants(source) if key == "tanh: 1 - y * y -> 1 + y * y"
    )
    x = np.ones((1, 1))

    def slope_is_below_one():
        return ops.tanh(x)[1](x) < 1

    assert source_mutants.killed(ops.tanh, tree, [slope_is_below_one])
    assert not source_mutants.killed(ops.tanh, tree, [lambda: ops.tanh(x)[0] < 1])
    assert not source_mutants.killed(ops.tanh, tree, [])
    assert slope_is_below_one()
