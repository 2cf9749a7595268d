"""`fixefficientnet demo`: a page in the browser, on which networks classify a person's photos."""

from fixefficientnet.demo.server import serve

__all__ = ["serve"]
