# y = x + b for each of three tokens, so db = 256 + 1 + 1 = 258, which bfloat16 holds.
import jax
import jax.numpy as jnp

dy = jnp.array([[256.0], [1], [1]], jnp.bfloat16)
_, back = jax.vjp(lambda b: jnp.zeros_like(dy) + b, jnp.zeros(1, jnp.bfloat16))
print("got     ", float(back(dy)[0][0]))
print("expected", float(jnp.sum(dy)))
