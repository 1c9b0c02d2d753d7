"""The life of a model between training and serving: where versions are kept and which one answers."""
