"""From a version in the store to answers over HTTP: slot, classifier, engine, API."""
