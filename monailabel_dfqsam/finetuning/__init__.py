"""Quantization-aware fine-tuning on a site's labels: from an artifact and labelled images to a better one.

The one part of this project that learns from people's images; it runs when somebody asks for it, and nothing
of the images is kept in what it writes but what weights hold. After arXiv 2412.11186: quantizers within the
encoder while it learns, and a share of the samples for each modality, so that none drowns the others.
"""
