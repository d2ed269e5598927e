"""Denoiser -> denoiser.

| Method | Here | Paper |
|---|---|---|
| classifier-free guidance, in an interval | `ClassifierFreeGuidance`, `log_sigma_interval` | Ho & Salimans 2022; Kynkäänniemi et al. 2024 |
| adaptive projected guidance | its rule `AdaptiveProjection` | Sadat et al. 2024 |
| CFG-Zero* | its rule `ZeroStar`, `ZeroInit` | Fan et al. 2025 |
| guidance rescale | `Rescaled` | Lin et al. 2024 |
| CFG++ | `samplers.cfg_pp.sample_cfg_pp` | Chung et al. 2024 |
| autoguidance | `Guided(WeakPair(...), w)` | Karras et al. 2024 |
| internal guidance | `Guided(InternalPair(...), w)` | Zhou et al. 2025 |
| classifier guidance | `ClassifierGuidance` | Dhariwal & Nichol 2021 |
"""  # noqa: E501
