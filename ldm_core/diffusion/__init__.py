"""Processes, the conversion table, timesteps, Denoiser and FlowMap."""
