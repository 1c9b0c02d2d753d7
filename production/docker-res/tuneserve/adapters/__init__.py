"""The dialects of platforms: each is a module here, `routes(service) -> APIRouter`, and a line in `catalog.py`.

Nothing imports an adapter but the catalog; an adapter calls the service and nothing below it.
"""
