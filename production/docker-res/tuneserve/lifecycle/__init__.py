"""The life of a model between training and serving: where versions are kept, which one answers, when one is trained."""
