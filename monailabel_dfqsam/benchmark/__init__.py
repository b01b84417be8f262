"""Speed, measured: the image encoder on every engine and its peers, and a viewer's click over HTTP."""
