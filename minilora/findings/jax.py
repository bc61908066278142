"""Findings in JAX."""

from minilora.findings.finding import Finding, Library

SEEN = "0.10.2"

FINDINGS = (
    Finding(
        id="jax.bias-gradient",
        title="The gradient of a bias is summed in half precision",
        severity="rounding",
        seen=SEEN,
        cause=(
            "the transpose of a broadcast is a sum in the array's own dtype, and jnp.sum's is"
            " not: the gradient of a bias carries the rounding of every partial sum"
        ),
        does="""
            A bias is added by broadcasting, whose transpose is a sum in the array's own dtype.
            `jnp.sum` itself sums half precisions in float32.
            """,
        code="jax/_src/lax/lax.py:6896 _broadcast_in_dim_transpose_rule",
        fix="Sum in float32 in the transpose of broadcast_in_dim, as jnp.sum does",
        right=r"""
            $\partial L / \partial b = \sum_t dy_t$, here a number that bfloat16 has.
            """,
        consequence="""
            From 256 on a bfloat16 sum of ones may stand still; what counts is the greatest partial
            sum against the end. The same goes for every parameter that is broadcast over tokens, as
            a norm's weight is.
            """,
        found_by=("jax", "linear.vjp.bias"),
    ),
)

LIBRARY = Library(
    "jax",
    "JAX",
    "jax",
    FINDINGS,
    files="https://github.com/jax-ml/jax/blob/jax-v{release}/{file}#L{line}",
)
