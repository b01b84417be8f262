"""Speed, measured: the encoder and a whole volume on every engine and its peers, and a click over HTTP."""
