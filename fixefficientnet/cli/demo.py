"""`demo`."""

from fixefficientnet import manifest
from fixefficientnet.cli.app import app, err, out
from fixefficientnet.options import DEMO_HOST, DEMO_PORT, LOOPBACK


@app.command
def demo(*models: str, host: str = DEMO_HOST, port: int = DEMO_PORT) -> None:
    """Show a page in the browser that classifies photos: two models side by side, at any test size.

    Args:
        models: Models as for `predict`; the first two stand side by side at first. Default: lite0.
        host: Address to listen on; 0.0.0.0 lets other machines in.
        port: Port to listen on.
    """
    from fixefficientnet.demo import serve

    def tell(address: str) -> None:
        out.say(f"{address} (Ctrl+C ends it)")
        if host not in LOOPBACK:
            err.print("Whoever reaches this machine can use the page, and nobody is asked for a password.")

    serve(models or (manifest.DEFAULT_MODEL,), host=host, port=port, on_start=tell)
