"""`dfqsam demo`: a Slicer session against the real server, from the first click to a requantized model."""
