"""Proxy-KD in JAX: distil a black-box model through an aligned white-box proxy.

Importing the package loads nothing heavy; import the room you need, for example
``proxykd_jax.losses``.
"""

__version__ = "0.1.0"
