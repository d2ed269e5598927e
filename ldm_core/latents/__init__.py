"""The latent store: schema, exactly-once commits, published versions, plan and reader."""
