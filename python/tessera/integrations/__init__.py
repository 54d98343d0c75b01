"""Methods as the attention of other libraries' models: `tessera.integrations.transformers`, `.diffusers`."""
