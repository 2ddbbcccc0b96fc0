"""Fine-tune an embedding model for German tax law whose vectors can be cut short."""
