"""Where a model lies, by whatever name the user has for it."""


def model_uri(name: str) -> str:
    """`models:/…` looked up in the registry, and any other URI as it is."""
    if not name.startswith("models:/"):
        return name
    from pipelines.model_registry import resolve_model  # here: MLflow takes seconds to import

    return resolve_model(name)
