"""Diffusion in a learned latent space (2112.10752): autoencoders, their training, and the codec.

`Latent` is a stage's codec around a frozen autoencoder, which is trained here (`stage=autoencoder`)
or comes in diffusers' format.
"""
