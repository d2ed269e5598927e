"""Ray jobs, one file a stage: read, call ldm_core, write, record."""
