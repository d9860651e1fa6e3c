"""One Llama-family decoder, LoRA, and Hugging Face and PEFT weights in and out.

Import the module you need: ``config`` (no jax), ``llama`` (forward passes and parameters),
``lora``, ``hf_weights``, ``peft``, ``fingerprint``, ``chunked``.
"""
