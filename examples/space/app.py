"""The demo as a Space of the Hugging Face Hub, which names host and port as Gradio does."""

import os

from fixefficientnet.demo import serve

serve(
    ["lite0"],
    host=os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"),
    port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")),
)
