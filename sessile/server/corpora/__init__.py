"""Corpora as a service: routes, the store of what is loaded, its budget and its folder, the link to the builder."""
