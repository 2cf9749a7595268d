"""The demo as a Space of the Hugging Face Hub, which names host and port as Gradio does."""

import os

from fixefficientnet.demo import serve

serve(
    ["lite0"],
    host=os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"),  # noqa: S104 - the Hub stands in front of a Space
    port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")),
)
