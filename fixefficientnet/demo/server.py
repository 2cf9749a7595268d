"""The server of the page, on loopback unless another host is asked for."""

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fixefficientnet import manifest
from fixefficientnet._internal import requirements
from fixefficientnet.demo.offer import Offer
from fixefficientnet.errors import FixEfficientNetError
from fixefficientnet.options import DEMO_HOST, DEMO_PORT

UPLOAD_LIMIT = "20mb"
"""Longest file that is taken; how many pixels an image may have, `open_image` says."""
SETTINGS = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "GRADIO_SHARE": "False",
    "GRADIO_ALLOWED_PATHS": "",
    "GRADIO_MCP_SERVER": "False",
}
"""Of the process: Gradio looks at them when it is imported, and at some whatever its functions are told."""


def _say(address: str) -> None:
    print(address, flush=True)  # whoever waits for it through a pipe must not wait longer


def serve(
    models: Sequence[str] = (manifest.DEFAULT_MODEL,),
    *,
    host: str = DEMO_HOST,
    port: int = DEMO_PORT,
    on_start: Callable[[str], object] = _say,
) -> None:
    """Shows the page until the process is interrupted.

    Args:
        models: Models as `load` takes them; the first two stand side by side, or the first one before and after FixRes.
        host: Address to listen on; "0.0.0.0" lets other machines in.
        port: Port to listen on.
        on_start: Called with the page's address once it is there.

    Raises:
        FixEfficientNetError: The port or the host cannot be used; or as `load` raises.
        ModuleNotFoundError: Gradio is not installed.
    """
    with serving(models, host=host, port=port) as address, contextlib.suppress(KeyboardInterrupt):
        on_start(address)
        threading.Event().wait()


@contextlib.contextmanager
def serving(models: Sequence[str], *, host: str = DEMO_HOST, port: int = DEMO_PORT) -> Iterator[str]:
    """Serves the page while the context lasts, and gives its address; see `serve`."""
    requirements.need("gradio")
    offer = Offer(models)
    with tempfile.TemporaryDirectory(prefix="fixefficientnet-demo-") as folder:
        files = Path(folder).resolve()
        os.environ.update(SETTINGS, GRADIO_TEMP_DIR=str(files))
        from starlette.middleware import Middleware

        from fixefficientnet.demo import page
        from fixefficientnet.demo.guard import Guard

        blocks = page.build(offer)
        try:
            _, address, _ = blocks.launch(
                server_name=host,
                server_port=port,
                share=False,
                inbrowser=False,
                prevent_thread_lock=True,
                quiet=True,
                max_file_size=UPLOAD_LIMIT,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                enable_monitoring=False,
                footer_links=[],
                theme=page.theme(),
                css=page.CSS,
                app_kwargs={"middleware": [Middleware(Guard, files=files, host=host)]},
            )
        except (OSError, OverflowError) as error:  # the second, of no port number
            raise FixEfficientNetError(
                f"{host}:{port} cannot be listened on; is another program there? Choose another --port, or --host."
            ) from error
        try:
            yield address
        finally:
            blocks.close(verbose=False)
