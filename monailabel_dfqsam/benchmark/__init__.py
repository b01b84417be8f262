"""Speed, measured: the image encoder and a whole volume on every engine and its peers, and a viewer's click."""
