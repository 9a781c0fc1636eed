"""CMD in JAX: content-frame / motion-latent video diffusion (Yu et al., ICLR 2024)."""

__version__ = "0.1.0"
